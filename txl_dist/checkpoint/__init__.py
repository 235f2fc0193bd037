"""Checkpoints: their format, how they are written in the background, and which are kept."""
