"""What a run tells of itself: metrics.jsonl is the truth; the console, the curve and W&B show it."""
