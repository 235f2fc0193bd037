"""Run directories: where a run resumes, and how a trained model is loaded."""
