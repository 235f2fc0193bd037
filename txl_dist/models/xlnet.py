"""XLNet (Yang et al. 2019): Transformer-XL's memory under permuted factorisation orders, by two streams.

    h <- LayerNorm(h + attention(h)),  g <- LayerNorm(g + attention(g to h))       the same weights for both
    h <- LayerNorm(h + feed-forward(h)),  and so for g

The content stream h starts as the embedded tokens. The query stream g starts as one learned vector, and has a row for
each position that is to be predicted, no other. A layer remembers its own content inputs, oldest first.

A batch of permutation language modelling (objectives/permutation_lm.py) says which positions are predicted, and by
their ranks in which order. A batch without is read causally, with a query for the token after each position: so the
same model is evaluated, scored and sampled from as any other. A batch of examples (objectives/examples.py) has no
query: its content is the output.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, Strict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from txl_dist.config.types import ALWAYS, EVALUATION, INT32_MAX, LANES, SCHEMA, Fraction, Positive, Size, SizeOrZero
from txl_dist.models.base import DEFAULT_RUNTIME, Batch, Carry, LanguageModel, Runtime, Shapes
from txl_dist.models.config import ModelConfig
from txl_dist.models.layers import cross_entropy
from txl_dist.models.layers.activations import ACTIVATIONS
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Dropout, Noise
from txl_dist.models.layers.state import State
from txl_dist.models.layers.transfer import to_device
from txl_dist.models.layers.two_stream import SEGMENTS, TwoStreamAttention, View, blocks_of, encode_both_ways


@dataclass(config=SCHEMA, frozen=True, kw_only=True)
class XLNetConfig(ModelConfig):
    """XLNet's hyper-parameters, by the names of the paper and of the authors' code.

    activation: gelu_tanh is that of the authors' code, by which the published models were trained; gelu_erf is
    transformers' "gelu".
    """

    name: Literal["xlnet"]
    d_model: Annotated[int, Strict(), Field(ge=2, le=INT32_MAX, multiple_of=2)]
    n_head: Size
    d_head: Size
    d_inner: Size
    mem_len: Annotated[SizeOrZero, LANES]  # hidden states remembered per layer and lane
    reuse_len: Annotated[Size, LANES]  # of a segment of permuted tokens, those that become memory, and are read again
    clamp_len: Annotated[int, Strict(), Field(ge=-1, le=INT32_MAX), EVALUATION]  # larger distances are treated as this
    activation: Literal["gelu_tanh", "gelu_erf", "relu"]
    dropout: Annotated[Fraction, ALWAYS]
    dropatt: Annotated[Fraction, ALWAYS]  # of the attention's probabilities
    init_std: Positive
    layer_norm_eps: Positive

    @property
    def attention_backends(self) -> tuple[str, ...]:
        """Return the formula: no kernel knows two streams yet."""
        return ("reference",)

    @property
    def lookback(self) -> int:
        """Return mem_len: every layer remembers so many tokens."""
        return self.mem_len

    @property
    def reads_both_ways(self) -> bool:
        """Return that it does, as an example has no order of prediction."""
        return True

    def problems(self, section: str = "model") -> Iterator[str]:
        """Yield what does not fit together, by the keys of the section in which it is given."""
        if self.clamp_len == 0:
            yield f"{section}.clamp_len=0: would make all distances equal; give -1 (no clamping) or 1 or more"
        if self.reuse_len > self.tgt_len:
            yield (
                f"{section}.reuse_len={self.reuse_len}: is a part of a segment, which has only "
                f"{section}.tgt_len={self.tgt_len} tokens"
            )

    def without_memory(self) -> "XLNetConfig":
        """Return the model that reads each segment alone."""
        return replace(self, mem_len=0)


class Embedding(nn.Module):
    """The table of the vocabulary, and the vector of a position whose token is to be predicted."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(vocab_size, d_model))
        self.mask = nn.Parameter(torch.empty(d_model))

    def forward(self, tokens: Tensor, queries: int) -> Tensor:
        """Embed int64 [lanes, length]; append the query rows: [lanes, length + queries, d_model]."""
        content = F.embedding(to_device(tokens, self.table.device), self.table)
        return torch.cat([content, self.mask.expand(len(tokens), queries, -1)], dim=1)


class FeedForward(nn.Module):
    """The position-wise feed-forward sublayer, with residual connection and layer normalisation."""

    def __init__(self, config: XLNetConfig):
        super().__init__()
        self.inner = nn.Linear(config.d_model, config.d_inner)
        self.outer = nn.Linear(config.d_inner, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.activation]
        self.inner_dropout = Dropout(config.dropout, variational=False)
        self.dropout = Dropout(config.dropout, variational=False)

    def forward(self, streams: Tensor, noise: Noise | None = None) -> Tensor:
        """Transform each row alone: [lanes, rows, d_model] -> [lanes, rows, d_model]."""
        inner = self.inner_dropout(self.activation(self.inner(streams)), noise)
        normed: Tensor = self.layer_norm(streams + self.dropout(self.outer(inner), noise))
        return normed


class Layer(nn.Module):
    """Attention, then feed-forward, of both streams."""

    def __init__(self, config: XLNetConfig, number: int):
        super().__init__()
        self.attention = TwoStreamAttention(
            *(config.d_model, config.n_head, config.d_head),
            dropout=config.dropout,
            dropatt=config.dropatt,
            eps=config.layer_norm_eps,
            is_last=number == config.n_layer - 1,
        )
        self.feed_forward = FeedForward(config)

    def forward(self, carry: Carry, state: State, shared: View, noise: Noise | None = None) -> tuple[Carry, State]:
        """Run both sublayers, with `XLNet.shared`; return the carry for the next layer, and the new state."""
        streams, *integers = carry
        streams, memory = self.attention(streams, state["memory"], shared, noise)
        return (self.feed_forward(streams, noise), *integers), {"memory": memory}


class Head(nn.Module):
    """The distribution over the vocabulary, by the embedding's table and a bias of its own."""

    def __init__(self, table: nn.Parameter):
        super().__init__()
        self.table = table
        self.bias = nn.Parameter(torch.empty(len(table)))

    def forward(self, queries: Tensor, targets: Tensor | None) -> Tensor:
        """Compute the negative log-likelihood of targets, or all log-probabilities where there are none; in nats.

        Args:
            queries: [lanes, queries, d_model].
            targets: int64 [lanes, queries], on any device; -100: not scored.
        """
        logits = F.linear(queries, self.table, self.bias)
        return cross_entropy.predict(logits, targets)


class XLNet(LanguageModel):
    """Embedding, layers of two streams with memory, and a softmax that shares the embedding's table.

    A carry is both streams [lanes, length + queries, d_model], content first (behind the last layer the queries alone,
    where there are some), and the integers of a batch: rank, lookback, segment [lanes, length], direction [lanes, 1],
    and positions [lanes, queries].
    """

    Config = XLNetConfig
    config: XLNetConfig
    inputs = ("inputs", "rank", "lookback", "segment", "direction", "positions")
    last_only = ("head",)
    token_head = "head"

    def __init__(self, config: XLNetConfig, vocab_size: int, runtime: Runtime = DEFAULT_RUNTIME):
        super().__init__(config, vocab_size, runtime)
        self.embedding = Embedding(vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.n_layer))
        self.head = Head(self.embedding.table)
        self.input_dropout = Dropout(config.dropout, variational=False)
        self.distance_dropout = Dropout(config.dropout, variational=False)
        self.output_dropout = Dropout(config.dropout, variational=False)
        self.complete()

    def initialise(self) -> None:
        """Draw all weights as the authors' code does, but for the mask, which has no initialiser there."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "layer_norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, 0.0, self.config.init_std)

    def inputs_of(self, batch: Batch) -> Carry:
        """Return the fields of a batch; where it has no order of its own, those of reading from left to right.

        Then content sees what is not behind it, and query i stands behind content i, at position i + 1.
        """
        if "positions" in batch:
            return super().inputs_of(batch)
        tokens = batch["inputs"]
        rank = torch.arange(tokens.size(1), device=tokens.device).expand(tokens.shape)
        forward = torch.ones_like(tokens[:, :1])
        return tokens, rank, batch["lookback"], torch.zeros_like(rank), forward, rank + 1

    def embed(self, inputs: Carry, noise: Noise | None = None) -> Carry:
        """Embed tokens, and append the queries: [lanes, length + queries, d_model]."""
        tokens, *integers = inputs
        queries = integers[-1].size(1)
        return self.input_dropout(self.embedding(tokens, queries), noise), *integers

    def shared(self, carry: Carry, noise: Noise | None = None) -> View:
        """Encode the distances, and find what each row of both streams sees."""
        streams, *integers = carry
        rank, lookback, segment, direction, positions = (to_device(field, streams.device) for field in integers)
        length = rank.size(1)
        mem_len = self.config.mem_len
        keys = mem_len + length
        is_causal = positions.size(1) == length
        encoding = encode_both_ways(
            keys, length, self.config.clamp_len, self.config.d_model, streams.dtype, streams.device
        )
        if self.training:  # else it is the very same tensor each time: a cache keeps what is computed of it
            encoding = self.distance_dropout(encoding[None], noise and noise.of_all_lanes())[0]
        key = torch.arange(-mem_len, length, device=streams.device)
        key_rank = F.pad(rank, (mem_len, 0), value=-1)[:, None]
        at = torch.arange(length, device=streams.device)[:, None]
        content = (at - key <= lookback[:, :, None]) & (key_rank <= rank[:, :, None])
        if is_causal:
            added = self.added(content, streams.dtype)
            blocks = blocks_of(length, None, mem_len)
            return View(length, length, encoding, None, blocks, added, added, None, None, None, None)
        distance = positions[:, :, None] - key
        query_rank = rank.gather(1, positions)
        query_lookback = lookback.gather(1, positions)
        queries = (distance <= query_lookback[:, :, None]) & (key_rank < query_rank[:, :, None])
        marks = torch.cat([segment, segment.gather(1, positions)], dim=1)
        return View(
            length=length,
            remembered=self.remembered(length, positions.size(1)),
            encoding=encoding,
            direction=direction[:, :, None, None].to(streams.dtype),
            blocks=blocks_of(length, self.remembered(length, positions.size(1)), mem_len),
            content=self.added(content, streams.dtype),
            queries=self.added(queries, streams.dtype),
            columns=keys - distance,
            seeing=queries.any(dim=2)[:, None, :, None].to(streams.dtype),
            segment_of_row=F.one_hot(marks, SEGMENTS),
            segment_of_key=F.one_hot(F.pad(segment, (mem_len, 0)), SEGMENTS),
        )

    def remembered(self, length: int, queries: int) -> int:
        """Return how many positions of a segment become memory, and see nothing behind them: reuse_len.

        Where nothing is predicted nothing is read again: then all positions become memory, and see each other.
        """
        return self.config.reuse_len if queries else length

    @staticmethod
    def added(visible: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores: 0 where a key is seen, else half of the least number: sums stay finite."""
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min / 2)

    def output(self, carry: Carry, noise: Noise | None = None) -> Tensor:
        """Return the query stream [lanes, queries, d_model]; where there is no query, the content."""
        streams, *integers = carry
        rows = integers[-1].size(1) or streams.size(1)
        dropped: Tensor = self.output_dropout(streams[:, -rows:], noise)
        return dropped

    @property
    def output_width(self) -> int:
        """Return d_model."""
        return self.config.d_model

    def predict_tokens(self, hidden: Tensor, targets: Tensor | None) -> Tensor:
        """Turn the query stream into the first result of `forward`."""
        prediction: Tensor = self.head(hidden, targets)
        return prediction

    def state_shapes(self) -> list[Shapes]:
        """Return [mem_len, d_model] for each layer: it remembers its own last content inputs, oldest first."""
        return [{"memory": (self.config.mem_len, self.config.d_model)} for _ in self.layers]

    def empty_cache(self, lanes: int, device: torch.device | None = None) -> list[State]:
        """Return an empty key/value cache for each layer."""
        device = device or next(self.parameters()).device
        return [
            {"memory": layer.attention.empty_cache(lanes, self.config.mem_len, device)}
            for layer in self.layers
            if isinstance(layer, Layer)
        ]

    def body_products(self, lanes: int, targets: int) -> list[list[Product]]:
        """List the products of the embedding (none) and of each layer, when `lanes` read one segment."""
        config = self.config
        seen = seen_keys(config, targets)
        reuse_len = self.remembered(config.tgt_len, targets) if targets < config.tgt_len else None
        attention_sizes = (lanes, config.tgt_len, targets, config.mem_len, reuse_len, seen)
        layers = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            rows = targets if layer.attention.is_last and targets else config.tgt_len + targets
            inner = Product(2 * lanes * rows * config.d_model * config.d_inner)
            layers.append([*layer.attention.products(*attention_sizes), inner, inner])
        return [[], *layers]

    def head_products(self, lanes: int, targets: int) -> list[Product]:
        """List the product of the head."""
        return [Product(2 * lanes * targets * self.config.d_model * self.vocab_size)]


def seen_keys(config: XLNetConfig, targets: int) -> tuple[float, float]:
    """Return how many keys a content row and a query see, on average, once the memory is full.

    In each half the context is seen by all, and of the targets those that come before in the order.
    """
    length = config.tgt_len
    if targets == length:  # read from left to right
        return (config.mem_len + (length + 1) / 2,) * 2
    if targets == 0:  # every position sees all others
        return config.mem_len + length, 0.0
    share = targets / length
    content = queries = 0.0
    before = 0
    for half in (config.reuse_len, length - config.reuse_len):
        predicted = share * half
        context = before + half - predicted
        content += context * half + predicted * (predicted + 1) / 2
        queries += context * predicted + predicted * (predicted - 1) / 2
        before += half
    return config.mem_len + content / length, config.mem_len + queries / targets
