"""Multi-head attention over a memory and the current segment, in the variants of Dai et al. 2019, tables 6 and 8.

All variants take queries of the segment, keys and values of memory and segment, and leave the rest to `attend`. They
differ in how they use positions, each in a class of its own: relative positions in the scores (`RelativeAttention`, the
paper's; `ShawAttention`), or positions added to the hidden states (`SinusoidalAttention` in the first layer,
`LearnedPositionsAttention` in every layer).
"""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from txl_dist.models.layers.attention_weights import AttentionWeights, ObservableAttention
from txl_dist.models.layers.backends import (
    AttentionWindow,
    RelativePositions,
    attend,
    attention_weights,
    keys_and_values,
)
from txl_dist.models.layers.cost import Product
from txl_dist.models.layers.dropout import Dropout, LaneDropout, Noise
from txl_dist.models.layers.state import KVCache, RelativeTerms, StateValue

# ---------------------------------------------------------------------------------------------------- distances


def distances(keys: int, clamp_len: int, device: torch.device) -> Tensor:
    """Return the distances keys - 1, ..., 1, 0, -1 as int64 [keys + 1]; with clamp_len > 0 none is above it.

    The last one stands for the future, which no query sees: `skew` needs one column more than there are keys.
    """
    distance = torch.arange(keys - 1, -2, -1, device=device)
    return distance.clamp(max=clamp_len) if clamp_len > 0 else distance


@lru_cache(maxsize=4)  # all segments of a run ask for the same one or two
def encode_distances(keys: int, clamp_len: int, d_model: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Encode `distances` as sinusoids R: [keys + 1, d_model]."""
    return sinusoids(distances(keys, clamp_len, device), d_model).to(dtype)


@lru_cache(maxsize=4)
def clip_distances(keys: int, clamp_len: int, max_distance: int, device: torch.device) -> Tensor:
    """Return the rows that `distances` have in a table of max_distance + 1 learned embeddings: int64 [keys + 1]."""
    return distances(keys, clamp_len, device).clamp(0, max_distance)


def sinusoids(position: Tensor, d_model: int) -> Tensor:
    """Encode positions [n] as float64 [n, d_model]: all sines, then all cosines.

    R of Dai et al. 2019, section 3.3; Vaswani et al. 2017, section 3.5.
    """
    # In float32 the angle of a far distance would be off by its rounding, 1e-4 at 2000.
    frequency = 10000 ** (torch.arange(0, d_model, 2, dtype=torch.float64, device=position.device) / -d_model)
    angle = position[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


# ----------------------------------------------------------------------------------------------------- variants


class Attention(ObservableAttention, ABC):
    """The attention sublayer: projections, attention, residual connection and layer normalisation.

    The state of a lane is the sublayer's own last mem_len inputs, oldest first. In evaluation it may be a `KVCache` of
    the keys and values made of them: the same numbers, computed once.

    Args:
        dropout: probability to drop a number of the sublayer's output.
        dropatt: probability to drop an attention probability.
        variational: whether dropout is the same at all positions of a segment.
        pre_lnorm: normalise what enters the sublayer, not what leaves it.
        backend: a key of `backends.BACKENDS`, or auto.

    Attributes:
        cacheable: whether keys and values stay the same from segment to segment.
        learns_positions: whether learned positions are added to the memory.
    """

    cacheable = True
    learns_positions = False

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_head: int,
        *,
        dropout: float,
        dropatt: float,
        variational: bool,
        pre_lnorm: bool,
        backend: str = "auto",
    ):
        super().__init__()
        self.d_model = d_model
        self.n_head = n_head
        self.d_head = d_head
        self.pre_lnorm = pre_lnorm
        self.backend = backend
        width = n_head * d_head
        self.q_net = nn.Linear(d_model, width, bias=False)
        self.kv_net = nn.Linear(d_model, 2 * width, bias=False)
        self.o_net = nn.Linear(width, d_model, bias=False)
        self.layer_norm = nn.LayerNorm(d_model)
        self.dropatt = LaneDropout(dropatt)
        self.dropout = Dropout(dropout, variational)

    @abstractmethod
    def queries(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Make of the projected queries those for content, and those for position in variants that have them.

        [lanes, length, n_head, d_head] each.
        """

    def relative_terms(self, encoding: Tensor) -> RelativeTerms | None:
        """Return r and bias of `RelativePositions`; None in variants whose scores have no positions."""
        return None

    def add_positions(self, hidden: Tensor, memory: Tensor, encoding: Tensor) -> tuple[Tensor, Tensor]:
        """Add their positions to hidden states and memory, in variants that do so; else return both as they are."""
        return hidden, memory

    def forward(
        self, hidden: Tensor, memory: StateValue, encoding: Tensor, window: AttentionWindow, noise: Noise | None = None
    ) -> tuple[Tensor, StateValue]:
        """Attend from a segment to its memory and to itself.

        Args:
            hidden: [lanes, length, d_model].
            memory: [lanes, mem_len, d_model], or a KVCache, to which the segment is appended.
            encoding: [mem_len + length + 1, d_model] of `encode_distances`, or [mem_len + length + 1] of
                `clip_distances`, as the variant needs it.
            noise: of these lanes, for dropout; None in evaluation.

        Returns:
            [lanes, length, d_model], and the memory for the next segment, detached.
        """
        new_memory: StateValue
        past: Tensor | None
        if isinstance(memory, KVCache):
            segment = self.normed(hidden)
            past = None
            present = memory.append(*self.keys_and_values(segment))
            terms = memory.memoise(self.relative_terms, encoding)
            new_memory = memory
        else:
            assert isinstance(memory, Tensor)
            new_memory = remember(memory, hidden)
            terms = self.relative_terms(encoding)
            hidden, remembered = self.add_positions(hidden, memory, encoding)
            segment = self.normed(hidden)
            # The memory apart from the segment, so that no gradient is computed for it.
            past = self.keys_and_values(self.normed(remembered))
            present = self.keys_and_values(segment)
        content, position = self.queries(self.heads(self.q_net(segment)))
        relative = RelativePositions(position, *terms) if position is not None and terms else None
        if self.observer is not None:
            key, _ = keys_and_values(past, present)
            by_head = attention_weights(content, key, relative, window).unflatten(0, (self.n_head, -1))
            states = memory if isinstance(memory, Tensor) else None
            shown = AttentionWeights(by_head.transpose(0, 1), window.distance[None], window.mem_len, states)
            self.observer(shown)
        attended = attend(self.backend, content, past, present, relative, window, self.dropatt.mask(noise))
        hidden = hidden + self.dropout(self.o_net(attended.flatten(-2)), noise)
        return (hidden if self.pre_lnorm else self.layer_norm(hidden)), new_memory

    def products(self, lanes: int, length: int, mem_len: int, same_length: bool) -> list[Product]:
        """List the products of matrices when `lanes` read a segment after a full memory."""
        keys = mem_len + length
        project = self.projection_cost
        attend = self.pair_cost * lanes * length  # all queries with one key each
        # The memory has no gradient, but where parameters stand between it and its keys and values.
        gradients = 2 if self.pre_lnorm or self.learns_positions else 1
        return [
            *[Product(project * lanes * length)] * 4,  # q, k, v, output
            *[Product(project * lanes * mem_len, gradients)] * 2,  # k and v of the memory
            *[Product(attend * keys, visible=seen_keys(length, mem_len, same_length) / keys)] * 2,  # content, values
        ]

    def position_product(self, lanes: int, length: int, mem_len: int, same_length: bool) -> Product:
        """Return the product of all queries for position with r."""
        columns = mem_len + length + 1
        visible = seen_keys(length, mem_len, same_length) / columns
        return Product(self.pair_cost * lanes * length * columns, visible=visible)

    @property
    def projection_cost(self) -> int:
        """Return the operations of one state by one of the weights."""
        return 2 * self.d_model * self.n_head * self.d_head

    @property
    def pair_cost(self) -> int:
        """Return the operations of a query with one key."""
        return 2 * self.n_head * self.d_head

    def normed(self, states: Tensor) -> Tensor:
        """Return the projections' input: [lanes, length, d_model], normalised here with pre_lnorm."""
        return self.layer_norm(states) if self.pre_lnorm else states

    def keys_and_values(self, states: Tensor) -> Tensor:
        """Project states [lanes, rows, d_model] to [2 (keys, values), lanes, rows, n_head, d_head]."""
        key_value: Tensor = self.kv_net(states).unflatten(-1, (2, self.n_head, self.d_head)).movedim(-3, 0)
        return key_value

    def heads(self, x: Tensor) -> Tensor:
        """Split [..., n * d_head] into heads, [..., n, d_head]."""
        split: Tensor = x.unflatten(-1, (-1, self.d_head))
        return split

    def empty_cache(self, lanes: int, mem_len: int, device: torch.device) -> StateValue:
        """Return an empty key/value cache on a device; hidden states for variants that cannot cache."""
        if not self.cacheable:
            return self.kv_net.weight.new_zeros(lanes, mem_len, self.d_model, device=device)
        shape = (2, self.n_head, lanes, mem_len, self.d_head)
        return KVCache(self.kv_net.weight.new_zeros(shape, device=device))


def remember(memory: Tensor, hidden: Tensor) -> Tensor:
    """Return the last mem_len positions of memory and segment together, detached (Dai et al. 2019, section 3.2).

    A view, where the segment alone has as many.

    Args:
        memory: [lanes, mem_len, d_model].
        hidden: [lanes, length, d_model].

    Returns:
        [lanes, mem_len, d_model].
    """
    mem_len = memory.size(1)
    length = hidden.size(1)
    present = hidden[:, max(0, length - mem_len) :].detach()
    return present if mem_len <= length else torch.cat([memory[:, length:], present], dim=1)


def seen_keys(length: int, mem_len: int, same_length: bool) -> float:
    """Return how many keys a query may see, on average, once the memory is full."""
    return mem_len if same_length else mem_len + (length + 1) / 2


class RelativeAttention(Attention):
    """Score (query + u) key + (query + v) W_r R_distance (Dai et al. 2019, section 3.3, terms a to d).

    u and v are each layer's own (the authors' untie_r); a pair shared by all layers is the case of equal values.
    """

    def __init__(self, d_model: int, n_head: int, d_head: int, **options: Any):
        super().__init__(d_model, n_head, d_head, **options)
        self.r_net = nn.Linear(d_model, n_head * d_head, bias=False)
        self.u = nn.Parameter(torch.empty(n_head, d_head))
        self.v = nn.Parameter(torch.empty(n_head, d_head))

    def queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return query + u for content and query + v for position."""
        return query + self.u, query + self.v

    def relative_terms(self, encoding: Tensor) -> RelativeTerms:
        """Return W_r R, [keys + 1, n_head, d_head], of R [keys + 1, d_model]; it has no bias."""
        r = self.heads(self.r_net(encoding))
        return r.movedim(0, 1).contiguous().movedim(1, 0), None  # each head contiguous: products are faster so

    def products(self, lanes: int, length: int, mem_len: int, same_length: bool) -> list[Product]:
        """List those of all attention, that of positions, and W_r R, which all lanes share."""
        r = Product(self.projection_cost * (mem_len + length + 1), gradients=1)
        sizes = (lanes, length, mem_len, same_length)
        return [*super().products(*sizes), self.position_product(*sizes), r]


class ShawAttention(Attention):
    """Score (query + u) key + query a_distance + b_distance: learned distances (Shaw et al. 2018, section 3.2).

    In the form that Dai et al. compare with: every head has its own a, the scores have biases u and b, and the values
    have no distances. Those beyond max_distance share the last a and b, as Shaw et al. clip theirs.
    """

    def __init__(self, d_model: int, n_head: int, d_head: int, max_distance: int, **options: Any):
        super().__init__(d_model, n_head, d_head, **options)
        self.a = nn.Parameter(torch.empty(n_head, max_distance + 1, d_head))
        self.b = nn.Parameter(torch.empty(n_head, max_distance + 1))
        self.u = nn.Parameter(torch.empty(n_head, d_head))

    def queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return query + u for content and the query itself for position."""
        return query + self.u, query

    def relative_terms(self, encoding: Tensor) -> RelativeTerms:
        """Look up a [keys + 1, n_head, d_head] and b [keys + 1, n_head] of the distances [keys + 1]."""
        return self.a[:, encoding].movedim(0, 1), self.b[:, encoding].T

    def products(self, lanes: int, length: int, mem_len: int, same_length: bool) -> list[Product]:
        """List those of all attention, and that of positions."""
        sizes = (lanes, length, mem_len, same_length)
        return [*super().products(*sizes), self.position_product(*sizes)]


class AbsoluteAttention(Attention):
    """Score query key, without positions: the layers above the first one of Vaswani et al. 2017 (section 3.2.1)."""

    def queries(self, query: Tensor) -> tuple[Tensor, None]:
        """Return the query for content; none for position."""
        return query, None


class SinusoidalAttention(AbsoluteAttention):
    """Add sinusoids to the hidden states: the first layer of Vaswani et al. 2017 (section 3.5).

    A position is the distance from the segment's end, for segment and memory alike, so what is remembered moves back
    with every segment. The memory holds the states as they were before, so that nothing is added twice. (The layers
    above remember states with the positions of *their* segment: the weakness that Dai et al. begin with, section 3.3.)
    """

    cacheable = False

    def add_positions(self, hidden: Tensor, memory: Tensor, encoding: Tensor) -> tuple[Tensor, Tensor]:
        """Add their positions to hidden states [lanes, length, d_model] and memory [lanes, mem_len, d_model]."""
        past, present = self.positions(encoding).split([memory.size(1), hidden.size(1)])
        return hidden + present, memory + past

    def positions(self, encoding: Tensor) -> Tensor:
        """Return what is added to memory and segment, [keys, d_model]."""
        return encoding[:-1]


class LearnedPositionsAttention(SinusoidalAttention):
    """Add learned positions, each layer its own (Al-Rfou et al. 2018, section 3); else as SinusoidalAttention."""

    learns_positions = True

    def __init__(self, d_model: int, n_head: int, d_head: int, max_distance: int, **options: Any):
        super().__init__(d_model, n_head, d_head, **options)
        self.position = nn.Parameter(torch.empty(max_distance + 1, d_model))

    def positions(self, encoding: Tensor) -> Tensor:
        """Look up the embeddings of the distances [keys + 1]: [keys, d_model]."""
        return self.position[encoding[:-1]]
