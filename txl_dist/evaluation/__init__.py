"""Questions to a trained model: likelihood, effective context, scores of texts, samples."""
