"""The values of the keys of its architectures."""
