"""Multi-head attention over a memory and the current segment, in the variants of Dai et al. 2019, tables 6 and 8.

Common to all: queries of the segment, keys and values of memory and segment, and `visibility`, which tells what each
query may see. They differ in how a position is told, each variant in a class of its own: relative distances in the
scores (`RelativeAttention`, the paper's; `ShawAttention`), or positions added to what is attended to
(`SinusoidalAttention` in the first layer, `LearnedPositionsAttention` in every layer).
"""

from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from txl_dist.config import ModelConfig
from txl_dist.models.dropout import Dropout


def visibility(reach: Tensor, mem_len: int, window: int | None = None) -> Tensor:
    """Which keys each query may attend to: those at distance 0, 1, ..., `reach` (and below `window`, where given).

    Keys are the mem_len remembered positions, then the segment's own: query i is at distance 0 from key mem_len + i.
    One integer a query thus hides an unfilled memory, another document and a lane's past before its reset alike.

    Args:
        reach: int64 [lanes, length], how many tokens back each position may look.
        mem_len: remembered positions, filled or not.
        window: same_length: every query sees at most this many keys, itself included.

    Returns:
        bool [lanes, length, mem_len + length].
    """
    length = reach.size(1)
    query = torch.arange(mem_len, mem_len + length, device=reach.device)
    key = torch.arange(mem_len + length, device=reach.device)
    distance = query[:, None] - key
    if window is not None:
        reach = reach.clamp(max=window - 1)
    return (distance >= 0) & (distance <= reach[:, :, None])


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


def skew(by_distance: Tensor) -> Tensor:
    """Turn scores by distance into scores by key, without a copy (Dai et al. 2019, appendix B).

    Query i of n has distance d in column keys - 1 - d and wants it at key keys - n + i - d, n - 1 - i columns further
    left. Leaving out the first n - 1 numbers and reading on in rows one shorter does just this: it moves the first row
    by n - 1, and each following one by one less. What comes to stand at future keys has no meaning and is to be masked.

    Args:
        by_distance: [..., length, keys + 1], contiguous in these two; the columns are distances keys - 1, ..., 0, -1.

    Returns:
        A view [..., length, keys].
    """
    *batch, length, columns = by_distance.shape
    keys = columns - 1
    return by_distance.flatten(-2).narrow(-1, length - 1, length * keys).view(*batch, length, keys)


class Attention(nn.Module, ABC):
    """The attention sublayer: projections, attention, residual connection and layer normalisation, and its memory.

    What is remembered of a lane are the sublayer's own last mem_len inputs, oldest first. In evaluation it may be the
    keys and values made of them instead (`caches`): the same numbers, made once.

    Attributes:
        caches: whether it is keys and values; only where they stay what they are as the segments go on (`cacheable`).
    """

    cacheable = True
    caches = False

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
    def scores(self, query: Tensor, key: Tensor, encoding: Tensor) -> Tensor:
        """How well each key answers each query, before masking, scaled by d_head ** -0.5.

        Heads come before lanes: what tells positions is common to all lanes, and so is one product a head for all.

        Args:
            query: [n_head, lanes, length, d_head].
            key: [n_head, lanes, keys, d_head].
            encoding: [keys + 1, ...], of `encode_distances`.

        Returns:
            [n_head, lanes, length, keys].
        """

    def place(self, hidden: Tensor, memory: Tensor, encoding: Tensor) -> tuple[Tensor, Tensor]:
        """Add to hidden states and memory their positions, in the variants that do."""
        return hidden, memory

    def forward(self, hidden: Tensor, memory: Tensor, encoding: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """[lanes, length, d_model] -> the same, and what is remembered for the next segment, detached.

        Args:
            memory: [lanes, mem_len, d_model], or keys and values [lanes, mem_len, 2 * n_head * d_head].
            encoding: [mem_len + length + 1, ...], of `encode_distances`.
            visible: bool [lanes, length, mem_len + length], of `visibility`.
        """
        inputs = hidden
        hidden, past = self.place(hidden, memory, encoding)
        segment = self.normed(hidden)
        # The memory apart from the segment, so that no gradient is computed for it.
        present = self.kv_net(segment)
        key_value = torch.cat([memory if self.caches else self.kv_net(self.normed(past)), present], dim=1)
        query, key, value = map(self.heads, [self.q_net(segment), *key_value.chunk(2, dim=-1)])
        scores = self.scores(query, key, encoding)
        # Added, not filled in: a sum costs nothing in backward, and a probability of zero has no gradient to be masked.
        scores = scores + torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, -torch.inf)
        attended = F.dropout(scores.softmax(dim=-1), self.config.dropatt, self.training) @ value
        hidden = hidden + self.dropout(self.o_net(attended.movedim(0, -2).flatten(-2)))
        remembered = remember(memory, present if self.caches else inputs)
        return (hidden if self.config.pre_lnorm else self.layer_norm(hidden)), remembered

    def normed(self, states: Tensor) -> Tensor:
        """What the projections see of [lanes, length, d_model]."""
        return self.layer_norm(states) if self.config.pre_lnorm else states

    def heads(self, x: Tensor) -> Tensor:
        """[..., n_head * d_head] -> [n_head, ..., d_head]."""
        return x.unflatten(-1, (self.config.n_head, -1)).movedim(-2, 0).contiguous()

    def empty_memory(self, lanes: int, mem_len: int) -> Tensor:
        """The memory before the first token: zeros, which `reach` hides."""
        weight, config = self.kv_net.weight, self.config
        width = 2 * config.n_head * config.d_head if self.caches else config.d_model
        return weight.new_zeros(lanes, mem_len, width)

    def cache(self, on: bool) -> None:
        """Begin, or end, to remember keys and values, where that can be; while it is on, weights must not change."""
        self.caches = on and self.cacheable


def remember(memory: Tensor, states: Tensor) -> Tensor:
    """The last mem_len positions of memory and segment together, detached."""
    mem_len, length = memory.size(1), states.size(1)
    return torch.cat([memory[:, length:], states[:, max(0, length - mem_len) :].detach()], dim=1)


def content_and_position(
    for_content: Tensor, for_position: Tensor, key: Tensor, r: Tensor, bias: Tensor | None = None
) -> Tensor:
    """(for_content key^T + skew(for_position r^T + bias)) * d_head ** -0.5.

    Args:
        for_content, for_position: [n_head, lanes, length, d_head], the queries.
        key: [n_head, lanes, keys, d_head].
        r: [n_head, keys + 1, d_head], what stands for distances keys - 1, ..., 0, -1.
        bias: [n_head, keys + 1].
    """
    n_head, lanes, length, d_head = for_content.shape
    scale = d_head**-0.5
    by_distance = (for_position * scale).flatten(1, 2) @ r.transpose(1, 2)
    if bias is not None:
        by_distance = by_distance + bias[:, None] * scale
    position = skew(by_distance.view(n_head, lanes, length, -1))
    content = (for_content * scale).flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
    return torch.baddbmm(position.flatten(0, 1), *content).view_as(position)


class RelativeAttention(Attention):
    """(query + u) key + (query + v) W_r R_distance (Dai et al. 2019, section 3.3, terms a to d).

    u and v are each layer's own (the authors' untie_r); a pair shared by all layers is the case of equal values.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.r_net = nn.Linear(config.d_model, config.n_head * config.d_head, bias=False)
        self.u = nn.Parameter(torch.empty(config.n_head, config.d_head))
        self.v = nn.Parameter(torch.empty(config.n_head, config.d_head))
        self.projected: tuple[Tensor, Tensor] | None = None

    def scores(self, query: Tensor, key: Tensor, encoding: Tensor) -> Tensor:
        u, v = self.u[:, None, None], self.v[:, None, None]
        return content_and_position(query + u, query + v, key, self.r(encoding))

    def r(self, encoding: Tensor) -> Tensor:
        """[n_head, keys + 1, d_head]; while `caches`, once for each encoding."""
        if not self.caches:
            return self.heads(self.r_net(encoding))
        if self.projected is None or self.projected[0] is not encoding:
            self.projected = encoding, self.heads(self.r_net(encoding))
        return self.projected[1]

    def cache(self, on: bool) -> None:
        super().cache(on)
        self.projected = None


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

    def scores(self, query: Tensor, key: Tensor, encoding: Tensor) -> Tensor:
        a, b = self.a[:, encoding], self.b[:, encoding]
        return content_and_position(query + self.u[:, None, None], query, key, a, b)


class AbsoluteAttention(Attention):
    """query key, and no position: the layers above the first one of Vaswani et al. 2017 (section 3.2.1)."""

    def scores(self, query: Tensor, key: Tensor, encoding: Tensor) -> Tensor:
        return (query * self.config.d_head**-0.5) @ key.transpose(-2, -1)


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
