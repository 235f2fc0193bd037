"""Trackers outside the run directory: W&B and Trackio. What goes wrong there is one line, never an error."""
