"""Transformer-XL checkpoints: Hugging Face's, the authors' and NVIDIA's in, and Hugging Face folders out."""
