"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024): layers whose memory has a constant size, however long the text is.

    h <- h + gated delta rule(RMSNorm(h))
    h <- h + feed-forward(RMSNorm(h))              feed-forward(x) = W_o (SiLU(W_g x) * W_i x)

A layer remembers of each lane a matrix per head, into which every token has been read, and the last inputs of its short
convolution (models/layers/gated_delta.py).
"""

from math import log
from typing import Annotated, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from txl_dist.config.types import ALWAYS, SCHEMA, Fraction, Positive, Size, StrictBool
from txl_dist.models.base import DEFAULT_RUNTIME, Carry, LanguageModel, Runtime, Shapes
from txl_dist.models.config import ModelConfig
from txl_dist.models.layers import cross_entropy
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Dropout, Noise
from txl_dist.models.layers.gated_delta import GatedDelta
from txl_dist.models.layers.state import State
from txl_dist.models.layers.transfer import to_device


@dataclass(config=SCHEMA, frozen=True, kw_only=True)
class GatedDeltaNetConfig(ModelConfig):
    """Gated DeltaNet's hyper-parameters (Yang et al. 2024, section 3.4, and the authors' code)."""

    name: Literal["gated_delta_net"]
    d_model: Size
    n_head: Size
    d_head: Size  # of queries and keys
    d_value: Size  # of values, for each head
    d_conv: Size  # tokens that the short convolution sees
    d_inner: Size
    dropout: Annotated[Fraction, ALWAYS]
    tie_weights: StrictBool  # the softmax uses the embedding's table
    init_std: Positive
    norm_eps: Positive


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


class Layer(nn.Module):
    """Gated delta rule, then feed-forward. A carry is hidden states [lanes, length, d_model] and lookback."""

    def __init__(self, config: GatedDeltaNetConfig):
        super().__init__()
        sizes = (config.d_model, config.n_head, config.d_head, config.d_value, config.d_conv)
        self.delta = GatedDelta(*sizes, dropout=config.dropout, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, carry: Carry, state: State, shared: Tensor, noise: Noise | None = None) -> tuple[Carry, State]:
        """Run both sublayers; return the carry for the next layer, and the new state."""
        hidden, lookback = carry
        hidden, new_state = self.delta(hidden, state, shared, noise)
        hidden = self.feed_forward(hidden, noise)
        return (hidden, lookback), {name: value.detach() for name, value in new_state.items()}

    def products(self, lanes: int, length: int) -> list[Product]:
        """List the products of matrices when `lanes` read a segment."""
        return [*self.delta.products(lanes, length), *self.feed_forward.products(lanes * length)]


class GatedDeltaNet(LanguageModel):
    """Embedding, layers with a state, normalisation and a softmax."""

    Config = GatedDeltaNetConfig
    config: GatedDeltaNetConfig
    last_only = ("norm", "softmax")

    def __init__(self, config: GatedDeltaNetConfig, vocab_size: int, runtime: Runtime = DEFAULT_RUNTIME):
        super().__init__(config, vocab_size, runtime)
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.softmax = nn.Linear(config.d_model, vocab_size, bias=False)
        if config.tie_weights:
            self.softmax.weight = self.embedding.weight
        self.input_dropout = Dropout(config.dropout, variational=False)
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

    def shared(self, carry: Carry, noise: Noise | None = None) -> Tensor:
        """Copy lookback to where the layers compute."""
        hidden, lookback = carry
        return to_device(lookback, hidden.device)

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
        """Return the shapes of the matrices and of the convolution's last inputs, for each layer."""
        return [layer.delta.state_shapes() for layer in self.layers if isinstance(layer, Layer)]

    def empty_cache(self, lanes: int, device: torch.device | None = None) -> list[State]:
        """Return each layer's state for evaluation, the matrices in float32 at least.

        Where each token is a segment of its own, half precision would lose what one adds to the sum of all before it.
        """
        cache = self.empty_memory(lanes, device)
        for state in cache:
            memory = state["memory"]
            assert isinstance(memory, Tensor)
            state["memory"] = memory.to(torch.promote_types(memory.dtype, torch.float32))
        return cache

    def body_products(self, lanes: int, targets: int) -> list[list[Product]]:
        """List the products of the embedding (none) and of each layer, when `lanes` read one segment."""
        length = self.config.tgt_len
        return [[], *(layer.products(lanes, length) for layer in self.layers if isinstance(layer, Layer))]

    def head_products(self, lanes: int, targets: int) -> list[Product]:
        """List the product of the softmax."""
        return [Product(2 * lanes * targets * self.config.d_model * self.vocab_size)]


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
