"""Layers of models: attention and its backends, adaptive embedding and softmax, dropout, the state that they carry."""
