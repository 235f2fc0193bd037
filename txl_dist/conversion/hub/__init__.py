"""What is copied into an exported folder and read there without txl_dist: these files know torch and transformers."""
