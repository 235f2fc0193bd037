"""The Reformer: Hugging Face's checkpoints in and out."""
