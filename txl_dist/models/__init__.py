"""The models: one architecture per file, readable beside its paper. They know tensors, but no DeepSpeed and no data."""
