"""The hyper-parameters of Transformer-XL, by the paper's names (Dai et al. 2019)."""

from typing import Any

from transformers import PretrainedConfig


class TransformerXLConfig(PretrainedConfig):
    """The hyper-parameters of a TransformerXLForCausalLM.

    Attributes:
        n_layer, d_model, n_head, d_head, d_inner: the model's size.
        tgt_len: tokens in a segment; a longer text is read segment by segment.
        mem_len: positions that each layer remembers.
        clamp_len: greater distances are treated as this one; -1: none are.
        same_length: every token attends to mem_len tokens, itself included.
        cutoffs: first tokens of the adaptive clusters but the first.
        div_val: each cluster's embedding is this many times narrower than the one before.
        tie_weights, tie_projections: the softmax uses the embedding's tables; the tail clusters its projections.
    """

    model_type = "txl_dist"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}

    def __init__(
        self,
        vocab_size: int = 257,
        n_layer: int = 12, d_model: int = 512, n_head: int = 8, d_head: int = 64, d_inner: int = 2048,
        tgt_len: int = 512, mem_len: int = 512, clamp_len: int = -1, same_length: bool = False,
        dropout: float = 0.1, dropatt: float = 0.0,
        div_val: int = 1, cutoffs: list[int] | None = None, tie_weights: bool = True, tie_projections: bool = False,
        pre_lnorm: bool = False, init_std: float = 0.02,
        **kwargs: Any,
    ):  # fmt: skip
        self.vocab_size = vocab_size
        self.n_layer = n_layer
        self.d_model = d_model
        self.n_head = n_head
        self.d_head = d_head
        self.d_inner = d_inner
        self.tgt_len = tgt_len
        self.mem_len = mem_len
        self.clamp_len = clamp_len
        self.same_length = same_length
        self.dropout = dropout
        self.dropatt = dropatt
        self.div_val = div_val
        self.cutoffs = cutoffs or []
        self.tie_weights = tie_weights
        self.tie_projections = tie_projections
        self.pre_lnorm = pre_lnorm
        self.init_std = init_std
        # The memory in the terms of transformers' cache: a window that counts the latest token, too.
        self.layer_types = ["sliding_attention"] * n_layer
        self.sliding_window = mem_len + 1
        # Tied weights are one parameter in the model itself: nothing is left for transformers to tie.
        super().__init__(**(kwargs | {"tie_word_embeddings": False}))
