"""What a run needs, before it runs: memory, time, communication and energy, from the parts of the model itself."""
