"""Data sets with labels, and the transforms of training."""
