"""Distributed training of language models with memory: Transformer-XL and its kin."""
