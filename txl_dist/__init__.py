"""Distributed training of language models with memory: Transformer-XL and its kin."""

__version__ = "0.1.0"  # of the package and of what it writes: pyproject.toml takes it from here
