"""Code that is copied into an exported folder and runs there without txl_dist, on torch and transformers alone."""
