"""Networks, their checkpoints, and the catalogue of models."""
