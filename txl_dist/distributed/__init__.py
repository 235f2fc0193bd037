"""Processes: which rank this one is, how they meet, and how they stop together."""
