"""Transformer-XL (Dai et al. 2019, section 3): attention over the segment and a memory of the segments before it.

    h~ = [SG(memory) ; h]                                  (section 3.2)
    q, k, v = h W_q, h~ W_k, h~ W_v;  r = R W_r            (section 3.3)
    h <- LayerNorm(h + attention(q, k, v, r, u, v))
    h <- LayerNorm(h + feed-forward(h))

A layer remembers of each lane its own last mem_len *inputs*, oldest first. Memory is an argument and a result: a
forward in training writes nothing, and may be repeated (activation checkpointing, pipelines) without harm.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, Strict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from txl_dist.config.types import (
    ALWAYS,
    EVALUATION,
    INT32_MAX,
    LANES,
    SCHEMA,
    Fraction,
    Positive,
    PositiveInt,
    Size,
    SizeOrZero,
    StrictBool,
)
from txl_dist.files.parsing import shown
from txl_dist.models.base import DEFAULT_RUNTIME, Carry, LanguageModel, Runtime, Shapes
from txl_dist.models.config import ModelConfig
from txl_dist.models.layers.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from txl_dist.models.layers.attention import (
    AbsoluteAttention,
    Attention,
    LearnedPositionsAttention,
    RelativeAttention,
    ShawAttention,
    SinusoidalAttention,
    clip_distances,
    encode_distances,
)
from txl_dist.models.layers.backends import BACKENDS, AttentionWindow, describe_backend
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Dropout, Noise, ReluDropout
from txl_dist.models.layers.state import State
from txl_dist.models.layers.transfer import to_device

Clamp = Annotated[int, Strict(), Field(ge=-1, le=INT32_MAX)]
Probability = Annotated[Fraction, ALWAYS]
ProbabilityOrDropout = Annotated[Fraction | None, ALWAYS]


@dataclass(config=SCHEMA, frozen=True, kw_only=True)
class TransformerXLConfig(ModelConfig):
    """Transformer-XL's hyper-parameters, by the paper's names (Dai et al. 2019, section 3 and the authors' code).

    attention: how positions are encoded: relative (the paper's), shaw (Shaw et al. 2018), absolute (Vaswani et al.
    2017), al_rfou (Al-Rfou et al. 2018). A vanilla Transformer is one of the latter two with mem_len 0.
    """

    name: Literal["transformer_xl"]
    d_model: Annotated[int, Strict(), Field(ge=2, le=INT32_MAX, multiple_of=2)]
    n_head: Size
    d_head: Size
    d_inner: Size
    attention: Literal["relative", "shaw", "absolute", "al_rfou"] = "relative"
    max_distance: Size = 1023  # shaw, al_rfou: the largest distance with an embedding of its own
    mem_len: Annotated[SizeOrZero, LANES]  # hidden states remembered per layer and lane
    clamp_len: Annotated[Clamp, EVALUATION]  # larger distances are treated as this one; -1: no clamping
    same_length: Annotated[StrictBool, EVALUATION]  # every token attends to mem_len tokens, itself included
    dropout: Probability
    dropatt: Probability  # of the attention's probabilities
    dropout_words: Probability = 0.0  # of the words of the vocabulary, each at all its positions in a segment
    dropout_input: ProbabilityOrDropout = None  # of the embedded tokens; null: as dropout
    dropout_ff: ProbabilityOrDropout = None  # within the feed-forward sublayers; null: as dropout
    dropout_output: ProbabilityOrDropout = None  # before the softmax; null: as dropout
    variational: Annotated[StrictBool, ALWAYS] = False  # all dropouts use one mask for all positions of a segment
    div_val: Size  # each cluster's embedding is this much narrower than the one before
    cutoffs: list[PositiveInt]  # the adaptive clusters' first tokens; empty: one full softmax
    tie_weights: StrictBool  # the softmax uses the embedding's table
    tie_projections: StrictBool  # ... and the tail clusters the embedding's projections
    pre_lnorm: StrictBool
    init_std: Positive

    @property
    def attention_backends(self) -> tuple[str, ...]:
        """Return those of layers/backends.py."""
        return tuple(BACKENDS)

    @property
    def lookback(self) -> int:
        """Return mem_len: every layer remembers so many tokens."""
        return self.mem_len

    @property
    def fewest_tensors(self) -> int:
        """Return the number of layers and of clusters with a table of their own."""
        return self.n_layer + (len(self.cutoffs) if self.div_val > 1 else 0)

    def problems(self, section: str = "model") -> Iterator[str]:
        """Yield what does not fit together, by the keys of the section in which it is given."""
        if self.clamp_len == 0:
            yield (
                f"{section}.clamp_len=0: would make all distances equal; give -1 (no clamping) or a distance of 1 or "
                "more"
            )
        if self.same_length and self.mem_len == 0:
            yield (
                f"{section}.same_length=true: every token attends to mem_len tokens, but {section}.mem_len=0; "
                "give a memory, or false"
            )
        if sorted(set(self.cutoffs)) != self.cutoffs:
            yield f"{section}.cutoffs={shown(self.cutoffs)}: must increase"
        if self.div_val > 1 and not self.cutoffs:
            yield (
                f"{section}.div_val={self.div_val}: narrows the embeddings of clusters, but {section}.cutoffs is "
                f"empty; give cutoffs, or {section}.div_val=1"
            )
        width = self.d_model
        for _ in self.cutoffs:
            width //= self.div_val
        if width < 1:
            yield (
                f"{section}.div_val={self.div_val}: leaves no dimension of {section}.d_model={self.d_model} for "
                f"cluster {len(self.cutoffs)}; give a smaller one, or fewer {section}.cutoffs"
            )

    def vocabulary_problems(self, vocab_size: int) -> Iterator[str]:
        """Yield whether a cluster begins beyond the vocabulary."""
        if self.cutoffs and self.cutoffs[-1] >= vocab_size:
            yield f"model.cutoffs={shown(self.cutoffs)}: must stay below the vocabulary of {vocab_size:,}"

    def without_memory(self) -> "TransformerXLConfig":
        """Return the model that reads each segment alone."""
        return replace(self, mem_len=0, same_length=False)


class FeedForward(nn.Module):
    """The position-wise feed-forward sublayer, with residual connection and layer normalisation."""

    def __init__(self, config: TransformerXLConfig):
        super().__init__()
        self.inner = nn.Linear(config.d_model, config.d_inner)
        self.outer = nn.Linear(config.d_inner, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model)
        inner = config.dropout if config.dropout_ff is None else config.dropout_ff
        self.inner_dropout = ReluDropout(inner, config.variational)
        self.dropout = Dropout(config.dropout, config.variational)
        self.pre_lnorm = config.pre_lnorm

    def forward(self, hidden: Tensor, noise: Noise | None = None) -> Tensor:
        """Transform each position alone: [lanes, length, d_model] -> [lanes, length, d_model]."""
        inner = self.inner_dropout(self.inner(self.layer_norm(hidden) if self.pre_lnorm else hidden), noise)
        hidden = hidden + self.dropout(self.outer(inner), noise)
        return hidden if self.pre_lnorm else self.layer_norm(hidden)

    def products(self, positions: int) -> list[Product]:
        """List the products of matrices for so many positions, of all lanes."""
        return [Product(2 * positions * self.inner.in_features * self.inner.out_features)] * 2


def build_attention(config: TransformerXLConfig, layer: int, backend: str = "auto") -> Attention:
    """Build a layer's attention, of the variant that model.attention names; `layer` counts from 0."""
    sizes = (config.d_model, config.n_head, config.d_head)
    options: dict[str, Any] = {
        "dropout": config.dropout,
        "dropatt": config.dropatt,
        "variational": config.variational,
        "pre_lnorm": config.pre_lnorm,
        "backend": backend,
    }
    if config.attention == "relative":
        return RelativeAttention(*sizes, **options)
    if config.attention == "shaw":
        return ShawAttention(*sizes, config.max_distance, **options)
    if config.attention == "al_rfou":
        return LearnedPositionsAttention(*sizes, config.max_distance, **options)
    return SinusoidalAttention(*sizes, **options) if layer == 0 else AbsoluteAttention(*sizes, **options)


class Layer(nn.Module):
    """Attention, then feed-forward. A carry is hidden states [lanes, length, d_model] and lookback [lanes, length]."""

    def __init__(self, config: TransformerXLConfig, number: int, backend: str):
        super().__init__()
        self.attention = build_attention(config, number, backend)
        self.feed_forward = FeedForward(config)

    def forward(
        self, carry: Carry, state: State, shared: tuple[Tensor, AttentionWindow], noise: Noise | None = None
    ) -> tuple[Carry, State]:
        """Run both sublayers, with `TransformerXL.shared`; return the carry for the next layer, and the new state."""
        hidden, lookback = carry
        hidden, memory = self.attention(hidden, state["memory"], *shared, noise)
        return (self.feed_forward(hidden, noise), lookback), {"memory": memory}

    def products(self, lanes: int, config: TransformerXLConfig) -> list[Product]:
        """List the products of matrices when `lanes` read a segment after a full memory."""
        attention = self.attention.products(lanes, config.tgt_len, config.mem_len, config.same_length)
        return [*attention, *self.feed_forward.products(lanes * config.tgt_len)]


class TransformerXL(LanguageModel):
    """Embedding, layers with memory, and softmax, adaptive or not."""

    Config = TransformerXLConfig
    config: TransformerXLConfig

    def __init__(self, config: TransformerXLConfig, vocab_size: int, runtime: Runtime = DEFAULT_RUNTIME):
        super().__init__(config, vocab_size, runtime)
        self.embedding = AdaptiveEmbedding(
            vocab_size, config.d_model, config.cutoffs, config.div_val, config.dropout_words
        )
        self.layers = nn.ModuleList(Layer(config, number, runtime.attention) for number in range(config.n_layer))
        self.softmax = AdaptiveSoftmax(self.embedding, config.tie_weights, config.tie_projections)
        self.dropout = Dropout(config.dropout, config.variational)
        self.input_dropout = self.build_dropout(config.dropout_input)
        self.output_dropout = self.build_dropout(config.dropout_output)
        self.complete()

    def build_dropout(self, p: float | None) -> Dropout:
        """Build a dropout with a probability of its own, or with the model's where that is None."""
        return Dropout(self.config.dropout if p is None else p, self.config.variational)

    def initialise(self) -> None:
        """Draw all weights as the authors' code does."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "layer_norm" in name:
                nn.init.normal_(parameter, 1.0, self.config.init_std)
            elif "projection" in name:
                nn.init.normal_(parameter, 0.0, 0.01)
            else:
                nn.init.normal_(parameter, 0.0, self.config.init_std)

    def embed(self, inputs: Carry, noise: Noise | None = None) -> Carry:
        """Embed tokens, int64 [lanes, length], as hidden states [lanes, length, d_model]."""
        tokens, lookback = inputs
        return self.input_dropout(self.embedding(tokens, noise), noise), lookback

    def shared(self, carry: Carry, noise: Noise | None = None) -> tuple[Tensor, AttentionWindow]:
        """Encode the distances, and find the keys that each query sees."""
        config = self.config
        hidden, lookback = carry
        lookback = to_device(lookback, hidden.device)
        keys = config.mem_len + lookback.size(1)
        if config.attention in ("shaw", "al_rfou"):  # which learn their embeddings
            encoding = clip_distances(keys, config.clamp_len, config.max_distance, hidden.device)
        else:
            encoding = encode_distances(keys, config.clamp_len, config.d_model, hidden.dtype, hidden.device)
            if self.training:  # else it is the very same tensor each time: a cache keeps what is computed of it
                encoding = self.dropout(encoding[None], noise and noise.of_all_lanes())[0]
        if config.same_length:  # mem_len keys at most, itself included
            lookback = lookback.clamp(max=config.mem_len - 1)
        return encoding, AttentionWindow(lookback, config.mem_len, hidden.dtype)

    def output(self, carry: Carry, noise: Noise | None = None) -> Tensor:
        """Return the hidden states [lanes, length, d_model]."""
        hidden, _ = carry
        dropped: Tensor = self.output_dropout(hidden, noise)
        return dropped

    @property
    def output_width(self) -> int:
        """Return d_model."""
        return self.config.d_model

    def predict_tokens(self, hidden: Tensor, targets: Tensor | None) -> Tensor:
        """Turn hidden states [lanes, length, d_model] into the first result of `forward`."""
        prediction: Tensor = self.softmax(hidden, targets)
        return prediction

    def body_products(self, lanes: int, targets: int) -> list[list[Product]]:
        """List the products of the embedding and of each layer, when `lanes` read one segment."""
        counts = self.embedding.expected_counts(lanes * self.config.tgt_len)
        layers = [layer.products(lanes, self.config) for layer in self.layers if isinstance(layer, Layer)]
        return [self.embedding.products(counts), *layers]

    def head_products(self, lanes: int, targets: int) -> list[Product]:
        """List the products of the softmax."""
        assert targets == self.config.tgt_len, "every position is predicted"
        tokens = lanes * self.config.tgt_len
        return self.softmax.products([tokens, *self.embedding.expected_counts(tokens)[1:]])

    def state_shapes(self) -> list[Shapes]:
        """Return [mem_len, d_model] for each layer: it remembers its own last inputs, oldest first."""
        return [{"memory": (self.config.mem_len, self.config.d_model)} for _ in self.layers]

    def empty_cache(self, lanes: int, device: torch.device | None = None) -> list[State]:
        """Return an empty key/value cache for each layer; hidden states for variants that cannot cache."""
        device = device or next(self.parameters()).device
        return [
            {"memory": layer.attention.empty_cache(lanes, self.config.mem_len, device)}
            for layer in self.layers
            if isinstance(layer, Layer)
        ]

    def describe_runtime(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return the attention backend, and a warning where its dropout does not belong to lanes."""
        return describe_backend(self.runtime.attention, device, dtype, self.config.dropatt)
