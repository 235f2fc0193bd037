"""The records of a run: metrics.jsonl is the truth; the console, the curve and W&B show it."""
