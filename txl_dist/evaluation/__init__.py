"""What a trained model is asked: likelihood, effective context, samples."""
