"""Checkpoints: their format, writing them in the background, and which of them are kept."""
