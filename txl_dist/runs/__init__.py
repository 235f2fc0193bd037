"""Run directories: where a run resumes, whether it is finished, and how a trained model is loaded."""
