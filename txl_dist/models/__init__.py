"""The models: one architecture a file, readable beside its paper. They know tensors only, no DeepSpeed and no data."""
