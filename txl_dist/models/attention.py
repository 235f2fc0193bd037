"""Relative multi-head attention over a memory and the current segment (Dai et al. 2019, section 3.3).

Two things are common to all layers and computed once a forward: which keys each query may see (`visibility`) and the
encoding of all distances (`sinusoids`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from txl_dist.config import ModelConfig


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


def sinusoids(keys: int, d_model: int, clamp_len: int, like: Tensor) -> Tensor:
    """R, the encoding of distances keys - 1, ..., 1, 0, -1 (section 3.3): all sines, then all cosines.

    Distances beyond clamp_len are treated as clamp_len (-1: none are). The last row stands for the future, which no
    query sees: `skew` wants one column more than there are keys.

    Returns:
        [keys + 1, d_model], of the dtype and on the device of `like`.
    """
    # In float32 the angle of a far distance would be off by its rounding, 1e-4 at 2000.
    distance = torch.arange(keys - 1, -2, -1, dtype=torch.float64, device=like.device)
    if clamp_len > 0:
        distance = distance.clamp(max=clamp_len)
    frequency = 10000 ** (torch.arange(0, d_model, 2, dtype=torch.float64, device=like.device) / -d_model)
    angle = distance[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)


def skew(by_distance: Tensor) -> Tensor:
    """Turn scores by distance into scores by key, without a copy (appendix B).

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


def relative_attention(
    query: Tensor, key: Tensor, value: Tensor, r: Tensor, u: Tensor, v: Tensor, visible: Tensor, dropatt: float = 0.0
) -> Tensor:
    """softmax((query + u) key^T + skew((query + v) r^T)) value, scaled by d_head ** -0.5 (section 3.3, terms a to d).

    Heads come before lanes: r is common to all lanes, and so its terms are one product a head for all lanes at once.

    Args:
        query: [n_head, lanes, length, d_head].
        key, value: [n_head, lanes, keys, d_head].
        r: [n_head, keys + 1, d_head], projected encodings of distances keys - 1, ..., 0, -1.
        u, v: [n_head, d_head], the global biases of content and of position.
        visible: bool [lanes, length, keys].
        dropatt: the share of attention probabilities to drop.

    Returns:
        [n_head, lanes, length, d_head].
    """
    n_head, lanes, length, d_head = query.shape
    for_content = (query + u[:, None, None]) * d_head**-0.5
    for_position = (query + v[:, None, None]) * d_head**-0.5
    position = skew((for_position.flatten(1, 2) @ r.transpose(1, 2)).view(n_head, lanes, length, -1))
    scores = torch.baddbmm(position.flatten(0, 1), for_content.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
    # Added, not filled in: a sum costs nothing in backward, and a probability of zero has no gradient to be masked.
    mask = torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, -torch.inf)
    scores = scores.view_as(position) + mask
    return F.dropout(scores.softmax(dim=-1), dropatt) @ value


class RelativeAttention(nn.Module):
    """The attention sublayer: projections, relative attention, residual connection and layer normalisation.

    u and v are each layer's own (the authors' untie_r); a pair shared by all layers is the case of equal values.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d_model, width = config.d_model, config.n_head * config.d_head
        self.n_head, self.dropatt, self.pre_lnorm = config.n_head, config.dropatt, config.pre_lnorm
        self.q_net = nn.Linear(d_model, width, bias=False)
        self.kv_net = nn.Linear(d_model, 2 * width, bias=False)
        self.r_net = nn.Linear(d_model, width, bias=False)
        self.o_net = nn.Linear(width, d_model, bias=False)
        self.u = nn.Parameter(torch.empty(config.n_head, config.d_head))
        self.v = nn.Parameter(torch.empty(config.n_head, config.d_head))
        self.layer_norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, memory: Tensor, encoding: Tensor, visible: Tensor) -> Tensor:
        """[lanes, length, d_model] -> the same.

        Args:
            memory: [lanes, mem_len, d_model], oldest first.
            encoding: [mem_len + length + 1, d_model], of `sinusoids`.
            visible: bool [lanes, length, mem_len + length], of `visibility`.
        """
        segment = hidden
        if self.pre_lnorm:
            segment, memory = self.layer_norm(segment), self.layer_norm(memory)
        # The memory apart from the segment, so that no gradient is computed for it.
        key_value = torch.cat([self.kv_net(memory), self.kv_net(segment)], dim=1)
        query, key, value = map(self.heads, [self.q_net(segment), *key_value.chunk(2, dim=-1)])
        r = self.heads(self.r_net(encoding))
        dropatt = self.dropatt if self.training else 0.0
        attended = relative_attention(query, key, value, r, self.u, self.v, visible, dropatt)
        hidden = hidden + self.dropout(self.o_net(attended.movedim(0, -2).flatten(-2)))
        return hidden if self.pre_lnorm else self.layer_norm(hidden)

    def heads(self, x: Tensor) -> Tensor:
        """[..., n_head * d_head] -> [n_head, ..., d_head]."""
        return x.unflatten(-1, (self.n_head, -1)).movedim(-2, 0).contiguous()
