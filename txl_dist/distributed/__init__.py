"""Processes: the rank of each, the process group they form, what they log, and how they stop together."""
