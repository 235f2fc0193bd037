"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024): layers whose memory has a constant size, however long the text is.

    h <- h + gated delta rule(RMSNorm(h))
    h <- h + feed-forward(RMSNorm(h))              feed-forward(x) = W_o (SiLU(W_g x) * W_i x)

A layer remembers of each lane a matrix per head, into which every token has been read, and the last inputs of its short
convolution (models/layers/gated_delta.py). In a hybrid (section 3.4) some layers have the attention of Transformer-XL
in its place, and remember their last mem_len inputs: they see a part of the text exactly, the others all of it in sum.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import log
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, Strict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from txl_dist.config.types import (
    ALWAYS,
    EVALUATION,
    INT32_MAX,
    LANES,
    SCHEMA,
    Fraction,
    Positive,
    Size,
    SizeOrZero,
    StrictBool,
)
from txl_dist.models.base import DEFAULT_RUNTIME, Carry, LanguageModel, Runtime, Shapes
from txl_dist.models.config import ModelConfig
from txl_dist.models.layers import cross_entropy
from txl_dist.models.layers.attention import RelativeAttention, encode_distances
from txl_dist.models.layers.backends import BACKENDS, AttentionWindow, describe_backend
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Dropout, Noise
from txl_dist.models.layers.gated_delta import GatedDelta
from txl_dist.models.layers.state import State
from txl_dist.models.layers.transfer import to_device


@dataclass(config=SCHEMA, frozen=True, kw_only=True)
class GatedDeltaNetConfig(ModelConfig):
    """The hyper-parameters of Gated DeltaNet (Yang et al. 2024, section 3.4) and of Transformer-XL's attention."""

    name: Literal["gated_delta_net"]
    layers: Annotated[list[Literal["delta", "attention"]], Field(min_length=1)] | None = None  # repeated up to n_layer
    d_model: Annotated[int, Strict(), Field(ge=2, le=INT32_MAX, multiple_of=2)]
    n_head: Size
    d_head: Size  # of queries and keys
    d_value: Size  # of values, for each head
    d_conv: Size  # tokens that the short convolution sees
    d_inner: Size
    mem_len: Annotated[SizeOrZero, LANES] = 0  # hidden states remembered per layer of attention and lane
    clamp_len: Annotated[int, Strict(), Field(ge=-1, le=INT32_MAX), EVALUATION] = -1  # larger distances are as this one
    dropout: Annotated[Fraction, ALWAYS]
    dropatt: Annotated[Fraction, ALWAYS] = 0.0  # of the attention's probabilities
    tie_weights: StrictBool  # the softmax uses the embedding's table
    init_std: Positive
    norm_eps: Positive

    @property
    def kinds(self) -> list[str]:
        """Return the kind of each layer."""
        pattern = self.layers or ["delta"]
        return [pattern[number % len(pattern)] for number in range(self.n_layer)]

    @property
    def attends(self) -> bool:
        """Return whether there is a layer of attention."""
        return "attention" in self.kinds

    @property
    def attention_backends(self) -> tuple[str, ...]:
        """Return those of layers/backends.py where a layer attends."""
        return tuple(BACKENDS) if self.attends else ()

    @property
    def lookback(self) -> int:
        """Return mem_len, and 1 at least: a state is of all tokens up to the last one before the segment."""
        return max(1, self.mem_len)

    def problems(self, section: str = "model") -> Iterator[str]:
        """Yield what does not fit together, by the keys of the section in which it is given."""
        if self.layers and len(self.layers) > self.n_layer:
            yield f"{section}.layers: names {len(self.layers)} layers of {section}.n_layer={self.n_layer}"
        if self.clamp_len == 0:
            yield f"{section}.clamp_len=0: would make all distances equal; give -1 (no clamping) or 1 or more"
        if self.mem_len and not self.attends:
            yield (
                f"{section}.mem_len={self.mem_len}: is the memory of attention, and no layer attends; give 0, or "
                f"{section}.layers=[delta,attention]"
            )


class Shared(NamedTuple):
    """What all layers share.

    Attributes:
        lookback: int64 [lanes, length], where the layers compute.
        encoding, window: of `RelativeAttention.forward`; None where no layer attends.
    """

    lookback: Tensor
    encoding: Tensor | None
    window: AttentionWindow | None


class FeedForward(nn.Module):
    """The position-wise feed-forward sublayer: normalisation first, SwiGLU (Shazeer 2020), and residual connection."""

    def __init__(self, config: GatedDeltaNetConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.gate = nn.Linear(config.d_model, config.d_inner, bias=False)
        self.inner = nn.Linear(config.d_model, config.d_inner, bias=False)
        self.outer = nn.Linear(config.d_inner, config.d_model, bias=False)
        self.inner_dropout = Dropout(config.dropout, variational=False)
        self.dropout = Dropout(config.dropout, variational=False)

    def forward(self, hidden: Tensor, noise: Noise | None = None) -> Tensor:
        """Transform each position alone: [lanes, length, d_model] -> [lanes, length, d_model]."""
        normed = self.norm(hidden)
        inner = self.inner_dropout(F.silu(self.gate(normed)) * self.inner(normed), noise)
        transformed: Tensor = hidden + self.dropout(self.outer(inner), noise)
        return transformed

    def products(self, positions: int) -> list[Product]:
        """List the products of matrices for so many positions, of all lanes."""
        return [Product(2 * positions * self.inner.in_features * self.inner.out_features)] * 3


class Layer(nn.Module, ABC):
    """A sublayer with a state, then feed-forward. A carry is hidden states [lanes, length, d_model] and lookback."""

    def __init__(self, config: GatedDeltaNetConfig):
        super().__init__()
        self.feed_forward = FeedForward(config)

    def forward(self, carry: Carry, state: State, shared: Shared, noise: Noise | None = None) -> tuple[Carry, State]:
        """Run both sublayers; return the carry for the next layer, and the new state."""
        hidden, lookback = carry
        hidden, new_state = self.mix(hidden, state, shared, noise)
        return (self.feed_forward(hidden, noise), lookback), new_state

    @abstractmethod
    def mix(self, hidden: Tensor, state: State, shared: Shared, noise: Noise | None) -> tuple[Tensor, State]:
        """Run the sublayer in which tokens see others."""

    @abstractmethod
    def products(self, lanes: int, config: GatedDeltaNetConfig) -> list[Product]:
        """List the products of matrices when `lanes` read a segment."""

    @abstractmethod
    def state_shapes(self, config: GatedDeltaNetConfig) -> Shapes:
        """Return the shapes of what it remembers of one lane, by name."""

    @abstractmethod
    def empty_cache(self, lanes: int, config: GatedDeltaNetConfig, device: torch.device) -> State:
        """Return its state for evaluation before the first token."""


class DeltaLayer(Layer):
    """The gated delta rule, then feed-forward."""

    def __init__(self, config: GatedDeltaNetConfig):
        super().__init__(config)
        sizes = (config.d_model, config.n_head, config.d_head, config.d_value, config.d_conv)
        self.delta = GatedDelta(*sizes, dropout=config.dropout, eps=config.norm_eps)

    def mix(self, hidden: Tensor, state: State, shared: Shared, noise: Noise | None) -> tuple[Tensor, State]:
        """Read the segment into the matrices, and out of them."""
        mixed: tuple[Tensor, State] = self.delta(hidden, state, shared.lookback, noise)
        return mixed

    def products(self, lanes: int, config: GatedDeltaNetConfig) -> list[Product]:
        """List the products of both sublayers."""
        length = config.tgt_len
        return [*self.delta.products(lanes, length), *self.feed_forward.products(lanes * length)]

    def state_shapes(self, config: GatedDeltaNetConfig) -> Shapes:
        """Return those of the matrices and of the convolution's last inputs."""
        return self.delta.state_shapes()

    def empty_cache(self, lanes: int, config: GatedDeltaNetConfig, device: torch.device) -> State:
        """Return zeros."""
        return self.delta.empty_cache(lanes, device)


class AttentionLayer(Layer):
    """Attention to a memory and the segment (Dai et al. 2019, section 3), then feed-forward."""

    def __init__(self, config: GatedDeltaNetConfig, backend: str):
        super().__init__(config)
        self.attention = RelativeAttention(
            *(config.d_model, config.n_head, config.d_head),
            dropout=config.dropout,
            dropatt=config.dropatt,
            variational=False,
            pre_lnorm=True,
            backend=backend,
        )

    def mix(self, hidden: Tensor, state: State, shared: Shared, noise: Noise | None) -> tuple[Tensor, State]:
        """Attend, and remember the last mem_len inputs."""
        hidden, memory = self.attention(hidden, state["memory"], shared.encoding, shared.window, noise)
        return hidden, {"memory": memory}

    def products(self, lanes: int, config: GatedDeltaNetConfig) -> list[Product]:
        """List the products of both sublayers, after a full memory."""
        attention = self.attention.products(lanes, config.tgt_len, config.mem_len, same_length=False)
        return [*attention, *self.feed_forward.products(lanes * config.tgt_len)]

    def state_shapes(self, config: GatedDeltaNetConfig) -> Shapes:
        """Return [mem_len, d_model]."""
        return {"memory": (config.mem_len, config.d_model)}

    def empty_cache(self, lanes: int, config: GatedDeltaNetConfig, device: torch.device) -> State:
        """Return an empty key/value cache."""
        return {"memory": self.attention.empty_cache(lanes, config.mem_len, device)}


class GatedDeltaNet(LanguageModel):
    """Embedding, layers with a state, normalisation and a softmax."""

    Config = GatedDeltaNetConfig
    config: GatedDeltaNetConfig
    last_only = ("norm", "softmax")

    def __init__(self, config: GatedDeltaNetConfig, vocab_size: int, runtime: Runtime = DEFAULT_RUNTIME):
        super().__init__(config, vocab_size, runtime)
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            DeltaLayer(config) if kind == "delta" else AttentionLayer(config, runtime.attention)
            for kind in config.kinds
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.softmax = nn.Linear(config.d_model, vocab_size, bias=False)
        if config.tie_weights:
            self.softmax.weight = self.embedding.weight
        self.input_dropout = Dropout(config.dropout, variational=False)
        self.distance_dropout = Dropout(config.dropout, variational=False)
        self.output_dropout = Dropout(config.dropout, variational=False)
        self.complete()

    def initialise(self) -> None:
        """Draw all weights as the authors' code does."""
        for name, parameter in self.named_parameters():
            if name.endswith("A_log"):
                draw_logarithm(parameter, 0.01, 16.0)
            elif name.endswith("dt_bias"):
                draw_step(parameter, 0.001, 0.1)
            elif name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("norm.bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("convolution.weight"):
                limit = parameter.size(-1) ** -0.5
                nn.init.uniform_(parameter, -limit, limit)
            else:
                nn.init.normal_(parameter, 0.0, self.config.init_std)

    def embed(self, inputs: Carry, noise: Noise | None = None) -> Carry:
        """Embed tokens, int64 [lanes, length], as hidden states [lanes, length, d_model]."""
        tokens, lookback = inputs
        embedded = self.embedding(to_device(tokens, self.embedding.weight.device))
        return self.input_dropout(embedded, noise), lookback

    def shared(self, carry: Carry, noise: Noise | None = None) -> Shared:
        """Copy lookback to where the layers compute; for attention encode the distances, and find the keys."""
        config = self.config
        hidden, lookback = carry
        lookback = to_device(lookback, hidden.device)
        if not config.attends:
            return Shared(lookback, None, None)
        keys = config.mem_len + lookback.size(1)
        encoding = encode_distances(keys, config.clamp_len, config.d_model, hidden.dtype, hidden.device)
        if self.training:  # else it is the very same tensor each time: a cache keeps what is computed of it
            encoding = self.distance_dropout(encoding[None], noise and noise.of_all_lanes())[0]
        return Shared(lookback, encoding, AttentionWindow(lookback, config.mem_len, hidden.dtype))

    def output(self, carry: Carry, noise: Noise | None = None) -> Tensor:
        """Return the hidden states, normalised, [lanes, length, d_model]."""
        hidden, _ = carry
        dropped: Tensor = self.output_dropout(self.norm(hidden), noise)
        return dropped

    @property
    def output_width(self) -> int:
        """Return d_model."""
        return self.config.d_model

    def predict_tokens(self, hidden: Tensor, targets: Tensor | None) -> Tensor:
        """Turn hidden states [lanes, length, d_model] into the first result of `forward`."""
        return cross_entropy.predict(self.softmax(hidden), targets)

    def state_shapes(self) -> list[Shapes]:
        """Return the shapes of what each layer remembers of one lane."""
        return [layer.state_shapes(self.config) for layer in self.layers if isinstance(layer, Layer)]

    def empty_cache(self, lanes: int, device: torch.device | None = None) -> list[State]:
        """Return matrices of zeros, in float32 at least, and for attention empty key/value caches."""
        device = device or next(self.parameters()).device
        return [layer.empty_cache(lanes, self.config, device) for layer in self.layers if isinstance(layer, Layer)]

    def body_products(self, lanes: int, targets: int) -> list[list[Product]]:
        """List the products of the embedding (none) and of each layer, when `lanes` read one segment."""
        return [[], *(layer.products(lanes, self.config) for layer in self.layers if isinstance(layer, Layer))]

    def head_products(self, lanes: int, targets: int) -> list[Product]:
        """List the product of the softmax."""
        return [Product(2 * lanes * targets * self.config.d_model * self.vocab_size)]

    def describe_runtime(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return the attention backend, where a layer attends."""
        if not self.config.attends:
            return ""
        return describe_backend(self.runtime.attention, device, dtype, self.config.dropatt)


@torch.no_grad()
def draw_logarithm(parameter: nn.Parameter, least: float, most: float) -> None:
    """Draw logarithms of numbers that are uniform between two limits."""
    nn.init.uniform_(parameter, least, most)
    parameter.log_()


@torch.no_grad()
def draw_step(parameter: nn.Parameter, least: float, most: float) -> None:
    """Draw numbers whose softplus is between two limits, log-uniform (Gu & Dao 2023, section 3.6)."""
    nn.init.uniform_(parameter, log(least), log(most))
    parameter.exp_().expm1_().log_()
