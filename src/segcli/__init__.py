"""Segmentation masks for folders of images, with fully convolutional networks (FCN)."""

__version__ = "0.1.0"
