"""From a folder of images to a folder of masks."""
