"""The Reformer (Kitaev, Kaiser, Levskaya 2020): attention by hashing, in reversible layers; without a memory.

    y1 = x1 + attention(LayerNorm(x2))
    y2 = x2 + feed-forward(LayerNorm(y1))        x1 = x2 = the embedded tokens at first

A segment is read alone, and may be as long as the table of positions. With `engine.activation_checkpointing` the
layers are reversed in backward: then their number costs no activations. `lsh: strict` is causal, what was published is
not (models/layers/hashed_attention.py).
"""

from collections.abc import Iterator
from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from txl_dist.config.types import ALWAYS, EVALUATION, SCHEMA, Fraction, Positive, Size, SizeOrZero, listed_number
from txl_dist.errors import UserError
from txl_dist.models.base import DEFAULT_RUNTIME, Batch, Carry, LanguageModel, Runtime, Shapes
from txl_dist.models.config import ModelConfig
from txl_dist.models.layers import cross_entropy
from txl_dist.models.layers.activations import ACTIVATIONS
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Dropout, Noise
from txl_dist.models.layers.hashed_attention import ChunkedAttention, LocalAttention, LSHAttention, View
from txl_dist.models.layers.reversible import add_layer, run_reversibly
from txl_dist.models.layers.state import State
from txl_dist.models.layers.text_cache import TextCache
from txl_dist.models.layers.transfer import to_device

Sizes = Annotated[list[Size], Field(min_length=1), BeforeValidator(listed_number)]


@dataclass(config=SCHEMA, frozen=True, kw_only=True)
class ReformerConfig(ModelConfig):
    """The Reformer's hyper-parameters."""

    name: Literal["reformer"]
    d_model: Size
    n_head: Size
    d_head: Size
    d_inner: Size
    attn_layers: Annotated[list[Literal["local", "lsh"]], Field(min_length=1)]  # repeated until there are n_layer
    lsh: Literal["strict", "published"] = "strict"  # whether attention by hashing is causal
    n_hashes: Annotated[Size, EVALUATION]  # rounds of hashing
    n_buckets: Sizes  # or even factors of their number
    hash_draw: Annotated[SizeOrZero, EVALUATION] = 0  # which of all rotations evaluation hashes by
    lsh_chunk_len: Size
    lsh_chunks_before: SizeOrZero = 1  # chunks before its own that a token may see
    local_chunk_len: Size
    local_chunks_before: SizeOrZero = 1
    axial_shape: Sizes  # of the table of positions; its product is the longest segment
    axial_widths: Sizes  # of the vectors along each axis, which joined are d_model wide
    ff_chunk_len: SizeOrZero = 0  # positions that a feed-forward sublayer computes at once; 0: all
    mem_len: SizeOrZero = 0
    activation: Literal["relu", "gelu_tanh", "gelu_erf"] = "relu"
    dropout: Annotated[Fraction, ALWAYS]
    dropatt: Annotated[Fraction, ALWAYS]  # of the probabilities of local attention
    dropatt_lsh: Annotated[Fraction, ALWAYS]  # of those of attention by hashing
    init_std: Positive
    axial_init_std: Positive = 1.0
    layer_norm_eps: Positive = 1e-12

    @property
    def lookback(self) -> int:
        """Return 0: a segment is read alone."""
        return 0

    @property
    def note(self) -> str:
        """Return what losses mean where hashing is as published."""
        if self.lsh == "strict" or "lsh" not in self.kinds:
            return ""
        return "hashing as published is not causal: losses are no conditional probabilities"

    @property
    def kinds(self) -> list[str]:
        """Return the kind of attention of each layer."""
        return [self.attn_layers[number % len(self.attn_layers)] for number in range(self.n_layer)]

    @property
    def max_len(self) -> int:
        """Return the number of positions that there are."""
        return prod(self.axial_shape)

    def problems(self, section: str = "model") -> Iterator[str]:
        """Yield what does not fit together, by the keys of the section in which it is given."""
        if self.mem_len:
            yield (
                f"{section}.mem_len={self.mem_len}: a Reformer has no memory, because its positions count from "
                f"the start of a segment; give 0, and a longer {section}.tgt_len"
            )
        if len(self.attn_layers) > self.n_layer:
            yield f"{section}.attn_layers: names {len(self.attn_layers)} layers of {section}.n_layer={self.n_layer}"
        if len(self.axial_shape) != len(self.axial_widths):
            yield f"{section}.axial_widths={self.axial_widths}: needs a width for each of {section}.axial_shape"
        if sum(self.axial_widths) != self.d_model:
            yield (
                f"{section}.axial_widths={self.axial_widths}: add up to {sum(self.axial_widths)}, "
                f"not to {section}.d_model={self.d_model}"
            )
        if self.tgt_len > self.max_len:
            yield (
                f"{section}.tgt_len={self.tgt_len}: there are only {self.max_len} positions, the product of "
                f"{section}.axial_shape={self.axial_shape}"
            )
        if self.lsh == "strict" and "lsh" in self.kinds and self.lsh_chunks_before == 0:
            yield (
                f"{section}.lsh_chunks_before=0: with {section}.lsh=strict tokens would see none but themselves; "
                "give 1 or more"
            )
        if any(factor % 2 for factor in self.n_buckets):
            yield f"{section}.n_buckets={self.n_buckets}: must be even, because a direction and its opposite are two"

    def without_memory(self) -> "ReformerConfig":
        """Return this model: it reads each segment alone."""
        return self


class Embedding(nn.Module):
    """The table of the vocabulary, and axial positions: a position's vector is joined from one for each axis."""

    def __init__(self, vocab_size: int, config: ReformerConfig):
        super().__init__()
        self.shape = config.axial_shape
        self.table = nn.Parameter(torch.empty(vocab_size, config.d_model))
        sizes = zip(config.axial_shape, config.axial_widths, strict=True)
        self.positions = nn.ParameterList(nn.Parameter(torch.empty(*size)) for size in sizes)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Embed int64 [lanes, length] at int64 positions [lanes or 1, length]: [lanes, length, d_model]."""
        vectors = []
        rest = position
        for size, table in zip(reversed(self.shape), reversed(list(self.positions)), strict=True):
            vectors.append(F.embedding(rest % size, table))
            rest = rest // size
        return F.embedding(tokens, self.table) + torch.cat(vectors[::-1], dim=-1)


class FeedForward(nn.Module):
    """The position-wise feed-forward sublayer: layer normalisation first, without residual connection."""

    def __init__(self, config: ReformerConfig, stores_all: bool):
        super().__init__()
        self.chunk_len = config.ff_chunk_len
        self.stores_all = stores_all
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.inner = nn.Linear(config.d_model, config.d_inner)
        self.outer = nn.Linear(config.d_inner, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.inner_dropout = Dropout(config.dropout, variational=False)
        self.dropout = Dropout(config.dropout, variational=False)

    def forward(self, stream: Tensor, noise: Noise | None = None) -> Tensor:
        """Transform each position alone: [lanes, length, d_model] -> [lanes, length, d_model], what is to be added."""
        if not self.chunk_len:
            return self.transform(stream, noise)
        pieces = []
        for number, piece in enumerate(stream.split(self.chunk_len, dim=1)):
            arguments = piece, noise and noise.of_part(number)
            if self.stores_all or not torch.is_grad_enabled():
                pieces.append(self.transform(*arguments))
            else:  # the layer's backward computes one piece at a time again
                pieces.append(checkpoint(self.transform, *arguments, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(pieces, dim=1)

    def transform(self, stream: Tensor, noise: Noise | None) -> Tensor:
        """Transform some positions."""
        normed = self.layer_norm(stream.to(self.inner.weight.dtype))
        inner = self.activation(self.inner_dropout(self.inner(normed), noise))
        outer: Tensor = self.dropout(self.outer(inner), noise)
        return outer


class Layer(nn.Module):
    """Attention, then feed-forward. A carry is both streams [lanes, length, 2 * d_model] and lookback."""

    attention: ChunkedAttention

    def __init__(self, config: ReformerConfig, number: int, stores_all: bool):
        super().__init__()
        sizes = config.d_model, config.n_head, config.d_head
        options: dict[str, Any] = {"dropout": config.dropout, "eps": config.layer_norm_eps}
        if config.kinds[number] == "local":
            options |= {"chunk_len": config.local_chunk_len, "before": config.local_chunks_before}
            self.attention = LocalAttention(*sizes, dropatt=config.dropatt, **options)
        else:
            options |= {"chunk_len": config.lsh_chunk_len, "before": config.lsh_chunks_before}
            options |= {"dropatt": config.dropatt_lsh, "strict": config.lsh == "strict"}
            self.attention = LSHAttention(*sizes, config.n_buckets, **options)
        self.feed_forward = FeedForward(config, stores_all)

    def forward(self, carry: Carry, state: State, shared: View, noise: Noise | None = None) -> tuple[Carry, State]:
        """Compute both streams for the next layer; a state is a text that is read piece by piece, or nothing."""
        streams, lookback = carry
        first, second = streams.chunk(2, dim=-1)
        cache = state.get("text")
        if isinstance(cache, TextCache):
            first = first + self.attention.read(second, shared, cache)
            second = second + self.feed_forward(first)
        else:
            (first, second), _ = add_layer((first, second), self, shared, noise)
        return (torch.cat([first, second], dim=-1), lookback), state


class Reformer(LanguageModel):
    """Embedding, reversible layers, layer normalisation and a softmax.

    Both streams stay in float32 at least, because half precision would not be reversible.
    """

    Config = ReformerConfig
    config: ReformerConfig
    inputs = ("inputs", "lookback", "position")
    last_only = ("layer_norm", "head")
    token_head = "head"

    def __init__(self, config: ReformerConfig, vocab_size: int, runtime: Runtime = DEFAULT_RUNTIME):
        super().__init__(config, vocab_size, runtime)
        stores_all = not runtime.activation_checkpointing
        self.embedding = Embedding(vocab_size, config)
        self.layers = nn.ModuleList(Layer(config, number, stores_all) for number in range(config.n_layer))
        self.layer_norm = nn.LayerNorm(2 * config.d_model, eps=config.layer_norm_eps)
        self.head = nn.Linear(2 * config.d_model, vocab_size)
        self.input_dropout = Dropout(config.dropout, variational=False)
        self.output_dropout = Dropout(config.dropout, variational=False)
        self.complete()

    def initialise(self) -> None:
        """Draw all weights as the published code does."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "layer_norm" in name:
                nn.init.ones_(parameter)
            elif "positions" in name:
                nn.init.normal_(parameter, 0.0, self.config.axial_init_std)
            else:
                nn.init.normal_(parameter, 0.0, self.config.init_std)

    def inputs_of(self, batch: Batch) -> Carry:
        """Return the fields of a batch; positions count from the start of the segment where it says nothing else.

        Raises:
            UserError: where a text is longer than there are positions.
        """
        tokens = batch["inputs"]
        if "position" in batch:
            position = batch["position"]
            max_len = self.config.max_len
            if int(position.max()) >= max_len:
                raise UserError(
                    f"model.axial_shape: has {max_len:,} positions, and the text more tokens; give less of it"
                )
        else:
            position = torch.arange(tokens.size(1), device=tokens.device).expand(tokens.shape)
        return tokens, batch["lookback"], position

    def embed(self, inputs: Carry, noise: Noise | None = None) -> Carry:
        """Embed tokens; both streams begin alike."""
        tokens, lookback, position = inputs
        device = self.embedding.table.device
        embedded = self.embedding(to_device(tokens, device), to_device(position, device))
        stream = self.input_dropout(embedded, noise)
        stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
        return torch.cat([stream, stream], dim=-1), lookback

    def shared(self, carry: Carry, noise: Noise | None = None) -> View:
        """Find the first position that each may see: of its segment, or of its document."""
        streams, lookback = carry
        lookback = to_device(lookback, streams.device)
        position = torch.arange(lookback.size(1), device=streams.device)
        return View((position - lookback).clamp(min=0), self.config.n_hashes, self.config.hash_draw)

    def through_layers(
        self, carry: Carry, memory: list[State], noise: Noise | None = None
    ) -> tuple[Carry, list[State]]:
        """Run all layers that are here, in training with `activation_checkpointing` reversibly."""
        if not (self.training and self.runtime.activation_checkpointing and len(self.layers)):
            return super().through_layers(carry, memory, noise)
        streams, lookback = carry
        shared = self.shared(carry, noise)
        layers = list(self.layers)
        streams = run_reversibly(streams, layers, shared, noise, self.activation_observer)  # type: ignore[arg-type]
        return (streams, lookback), memory

    def output(self, carry: Carry, noise: Noise | None = None) -> Tensor:
        """Return both streams, normalised, [lanes, length, 2 * d_model]."""
        streams, _ = carry
        normed = self.layer_norm(streams.to(self.layer_norm.weight.dtype))
        dropped: Tensor = self.output_dropout(normed, noise)
        return dropped

    @property
    def output_width(self) -> int:
        """Return 2 * d_model: both streams."""
        return 2 * self.config.d_model

    def predict_tokens(self, hidden: Tensor, targets: Tensor | None) -> Tensor:
        """Turn both streams into the first result of `forward`."""
        return cross_entropy.predict(self.head(hidden), targets)

    def state_shapes(self) -> list[Shapes]:
        """Return nothing for each layer: no segment knows of the one before."""
        return [{} for _ in self.layers]

    def empty_context(self, lanes: int, device: torch.device | None = None) -> list[State]:
        """Return for each layer the keys and values of a text that has not begun."""
        config = self.config
        weight = self.layer_norm.weight
        return [{"text": TextCache.empty(lanes, config.n_head, weight, config.d_head, device)} for _ in self.layers]

    def body_products(self, lanes: int, targets: int) -> list[list[Product]]:
        """List the products of the embedding (none) and of each layer, when `lanes` read one segment."""
        config = self.config
        inner = Product(2 * lanes * config.tgt_len * config.d_model * config.d_inner)
        layers = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layers.append([*layer.attention.products(lanes, config.tgt_len, config.n_hashes), inner, inner])
        return [[], *layers]

    def head_products(self, lanes: int, targets: int) -> list[Product]:
        """List the product of the head."""
        return [Product(2 * lanes * targets * self.output_width * self.vocab_size)]
