"""The keys of Hugging Face's Reformer configs, and ours."""

# Our keys whose values Hugging Face's config has under another name; attn_layers names all layers there.
THEIRS = {
    "d_model": "hidden_size",
    "n_head": "num_attention_heads",
    "d_head": "attention_head_size",
    "d_inner": "feed_forward_size",
    "attn_layers": "attn_layers",
    "n_hashes": "num_hashes",
    "n_buckets": "num_buckets",
    "lsh_chunk_len": "lsh_attn_chunk_length",
    "lsh_chunks_before": "lsh_num_chunks_before",
    "local_chunk_len": "local_attn_chunk_length",
    "local_chunks_before": "local_num_chunks_before",
    "ff_chunk_len": "chunk_size_feed_forward",
    "dropout": "hidden_dropout_prob",
    "dropatt": "local_attention_probs_dropout_prob",
    "dropatt_lsh": "lsh_attention_probs_dropout_prob",
    "init_std": "initializer_range",
    "axial_init_std": "axial_norm_std",
    "layer_norm_eps": "layer_norm_eps",
}

# What an exported folder keeps in a section of its own: Hugging Face's config has no such key, or its model does not
# generate with it (ff_chunk_len: there one new token is no whole chunk).
OWN = ("attn_layers", "lsh", "hash_draw", "tgt_len", "ff_chunk_len")
