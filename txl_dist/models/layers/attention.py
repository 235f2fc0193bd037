"""Multi-head attention over a memory and the current segment, in the variants of Dai et al. 2019, tables 6 and 8.

Common to all: queries of the segment, keys and values of memory and segment; `attend` computes what is made of them.
They differ in how a position is told, each variant in a class of its own: relative distances in the scores
(`RelativeAttention`, the paper's; `ShawAttention`), or positions added to what is attended to (`SinusoidalAttention` in
the first layer, `LearnedPositionsAttention` in every layer).
"""

from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor, nn

from txl_dist.config.schema import ModelConfig
from txl_dist.models.layers.backends import AttentionWindow, RelativePositions, attend
from txl_dist.models.layers.dropout import Dropout
from txl_dist.models.memory import Cache, States


def encode_distances(config: ModelConfig, keys: int, like: Tensor) -> Tensor:
    """Distances keys - 1, ..., 1, 0, -1 as the variant's layers want them told; beyond clamp_len all are clamp_len.

    The last one stands for the future, which no query sees: `skew` wants one column more than there are keys.

    Returns:
        Of the variants with learned embeddings int64 [keys + 1], the rows of their tables; of the others sinusoids
        [keys + 1, d_model] of the dtype of `like`; on its device.
    """
    farthest = config.max_distance if config.attention in ("shaw", "al_rfou") else None
    return encoded(keys, config.clamp_len, farthest, config.d_model, like.dtype, like.device)


@lru_cache(maxsize=4)  # all segments of a run ask for the same one or two
def encoded(
    keys: int, clamp_len: int, farthest: int | None, d_model: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    distance = torch.arange(keys - 1, -2, -1, device=device)
    if clamp_len > 0:
        distance = distance.clamp(max=clamp_len)
    return sinusoids(distance, d_model).to(dtype) if farthest is None else distance.clamp(0, farthest)


def sinusoids(position: Tensor, d_model: int) -> Tensor:
    """R (Dai et al. 2019, section 3.3; Vaswani et al. 2017, section 3.5): all sines, then all cosines.

    [n] -> float64 [n, d_model].
    """
    # In float32 the angle of a far distance would be off by its rounding, 1e-4 at 2000.
    frequency = 10000 ** (torch.arange(0, d_model, 2, dtype=torch.float64, device=position.device) / -d_model)
    angle = position[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Attention(nn.Module, ABC):
    """The attention sublayer: projections, attention, residual connection and layer normalisation.

    What is remembered of a lane are the sublayer's own last mem_len inputs, oldest first. In evaluation it may be the
    keys and values made of them instead, a `Cache`: the same numbers, made once.

    Attributes:
        way: how it is computed, of `attend.WAYS`, or auto.
        cacheable: whether keys and values stay what they are as the segments go on.
    """

    way = "auto"
    cacheable = True

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        d_model, width = config.d_model, config.n_head * config.d_head
        self.q_net = nn.Linear(d_model, width, bias=False)
        self.kv_net = nn.Linear(d_model, 2 * width, bias=False)
        self.o_net = nn.Linear(width, d_model, bias=False)
        self.layer_norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(config.dropout, config.variational)

    @abstractmethod
    def queries(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of [lanes, length, n_head, d_head] what asks for content, and in some variants what asks for position."""

    def told(self, encoding: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """What stands for distances in scores, r and bias of `Distances`, in the variants that ask for position."""
        return None

    def place(self, hidden: Tensor, memory: Tensor, encoding: Tensor) -> tuple[Tensor, Tensor]:
        """Add to hidden states and memory their positions, in the variants that do."""
        return hidden, memory

    def forward(
        self, hidden: Tensor, memory: States, encoding: Tensor, window: AttentionWindow
    ) -> tuple[Tensor, States]:
        """[lanes, length, d_model] -> the same, and what is remembered for the next segment, detached.

        Args:
            memory: [lanes, mem_len, d_model], or a Cache, to which the segment is added.
            encoding: [mem_len + length + 1, ...], of `encode_distances`.
        """
        remembered: States
        if isinstance(memory, Cache):
            segment = self.normed(hidden)
            key, value = memory.append(*self.heads(self.kv_net(segment)).chunk(2, dim=-2))
            told, remembered = memory.once(self.told, encoding), memory
        else:
            told, remembered = self.told(encoding), remember(memory, hidden)
            hidden, past = self.place(hidden, memory, encoding)
            segment = self.normed(hidden)
            # The memory apart from the segment, so that no gradient is computed for it.
            key_value = torch.cat([self.kv_net(self.normed(past)), self.kv_net(segment)], dim=1)
            key, value = self.heads(key_value).chunk(2, dim=-2)
        content, position = self.queries(self.heads(self.q_net(segment)))
        distances = RelativePositions(position, *told) if position is not None and told else None
        dropout = self.config.dropatt if self.training else 0.0
        attended = attend(self.way, content, key, value, distances, window, dropout)
        hidden = hidden + self.dropout(self.o_net(attended.flatten(-2)))
        return (hidden if self.config.pre_lnorm else self.layer_norm(hidden)), remembered

    def normed(self, states: Tensor) -> Tensor:
        """What the projections see of [lanes, length, d_model]."""
        return self.layer_norm(states) if self.config.pre_lnorm else states

    def heads(self, x: Tensor) -> Tensor:
        """[..., n * d_head] -> [..., n, d_head]: n_head, or twice as many, keys before values."""
        return x.unflatten(-1, (-1, self.config.d_head))

    def empty_memory(self, lanes: int, mem_len: int) -> Tensor:
        """The memory before the first token: zeros, which `reach` hides."""
        return self.kv_net.weight.new_zeros(lanes, mem_len, self.config.d_model)

    def empty_cache(self, lanes: int, mem_len: int, device: torch.device) -> States:
        """The same on a device, as a Cache where that can be."""
        if not self.cacheable:
            return self.empty_memory(lanes, mem_len).to(device)
        shape = 2, self.config.n_head, lanes, mem_len, self.config.d_head
        return Cache(self.kv_net.weight.new_zeros(shape, device=device))


def remember(memory: Tensor, states: Tensor) -> Tensor:
    """The last mem_len positions of memory and segment together, detached."""
    mem_len, length = memory.size(1), states.size(1)
    return torch.cat([memory[:, length:], states[:, max(0, length - mem_len) :].detach()], dim=1)


class RelativeAttention(Attention):
    """(query + u) key + (query + v) W_r R_distance (Dai et al. 2019, section 3.3, terms a to d).

    u and v are each layer's own (the authors' untie_r); a pair shared by all layers is the case of equal values.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.r_net = nn.Linear(config.d_model, config.n_head * config.d_head, bias=False)
        self.u = nn.Parameter(torch.empty(config.n_head, config.d_head))
        self.v = nn.Parameter(torch.empty(config.n_head, config.d_head))

    def queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return query + self.u, query + self.v

    def told(self, encoding: Tensor) -> tuple[Tensor, None]:
        r = self.heads(self.r_net(encoding))
        return r.movedim(0, 1).contiguous().movedim(1, 0), None  # a head in one piece: products are faster so


class ShawAttention(Attention):
    """(query + u) key + query a_distance + b_distance: learned distances (Shaw et al. 2018, section 3.2).

    In the form that Dai et al. compare with: every head has its own a, the scores have biases u and b, and the values
    have no distances. Those beyond max_distance share the last a and b, as Shaw et al. clip theirs.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.a = nn.Parameter(torch.empty(config.n_head, config.max_distance + 1, config.d_head))
        self.b = nn.Parameter(torch.empty(config.n_head, config.max_distance + 1))
        self.u = nn.Parameter(torch.empty(config.n_head, config.d_head))

    def queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return query + self.u, query

    def told(self, encoding: Tensor) -> tuple[Tensor, Tensor]:
        return self.a[:, encoding].movedim(0, 1), self.b[:, encoding].T


class AbsoluteAttention(Attention):
    """query key, and no position: the layers above the first one of Vaswani et al. 2017 (section 3.2.1)."""

    def queries(self, query: Tensor) -> tuple[Tensor, None]:
        return query, None


class SinusoidalAttention(AbsoluteAttention):
    """Adds sinusoids to what it attends to: the first layer of Vaswani et al. 2017 (section 3.5).

    A position is told as its distance from the segment's end, for segment and memory alike, so it grows as the segments
    go on. The memory holds the states as they were before, so that nothing is added twice. (The layers above remember
    states with the positions of *their* segment: the weakness that Dai et al. begin with, section 3.3.)
    """

    cacheable = False

    def place(self, hidden: Tensor, memory: Tensor, encoding: Tensor) -> tuple[Tensor, Tensor]:
        past, present = self.positions(encoding).split([memory.size(1), hidden.size(1)])
        return hidden + present, memory + past

    def positions(self, encoding: Tensor) -> Tensor:
        """What is added to memory and segment, [keys, d_model]."""
        return encoding[:-1]


class LearnedPositionsAttention(SinusoidalAttention):
    """Adds learned positions, in every layer its own (Al-Rfou et al. 2018, section 3); else as SinusoidalAttention."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.position = nn.Parameter(torch.empty(config.max_distance + 1, config.d_model))

    def positions(self, encoding: Tensor) -> Tensor:
        return self.position[encoding[:-1]]


def attention_of_layer(config: ModelConfig, layer: int) -> Attention:
    """The attention of the variant that model.attention names."""
    if config.attention == "relative":
        return RelativeAttention(config)
    if config.attention == "shaw":
        return ShawAttention(config)
    if config.attention == "al_rfou":
        return LearnedPositionsAttention(config)
    return SinusoidalAttention(config) if layer == 0 else AbsoluteAttention(config)
