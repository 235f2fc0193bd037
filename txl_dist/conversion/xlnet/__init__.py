"""XLNet checkpoints: Hugging Face's folders in and out, and the authors' TensorFlow checkpoints in."""
