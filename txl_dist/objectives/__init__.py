"""What a model is trained for: from its outputs to a loss."""
