"""The attention core shared by all variants, and its backends.

    softmax((content key^T + position r_distance + bias_distance) / sqrt(d_head)) value

`content` and `position` are two queries (Dai et al. 2019, section 3.3: q + u and q + v); r and bias depend on the
distance between query and key. The backends (`BACKENDS`) take the same arguments and differ by rounding:

    content       [lanes, length, n_head, d_head]
    past          [2 (keys, values), lanes, rows, n_head, d_head] of the first keys, or None
    present       [2 (keys, values), lanes, rows, n_head, d_head] of the last keys
    relative      RelativePositions; None: scores have no positions
    window        AttentionWindow
    mask          the Mask by which attention probabilities are dropped, or None
    result        [lanes, length, n_head, d_head]
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from txl_dist.models.layers.dropout import HAS_TRITON, Mask, drop


class RelativePositions(NamedTuple):
    """The terms of the scores that depend on the distance between query and key.

    Attributes:
        position: [lanes, length, n_head, d_head], the queries for position.
        r: [keys + 1, n_head, d_head], for distances keys - 1, ..., 1, 0, -1; the last stands for the future.
        bias: [keys + 1, n_head], for the same distances; or None.
    """

    position: Tensor
    r: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class AttentionWindow:
    """The keys that each query sees: those at distance 0, 1, ..., `lookback`.

    Keys are the mem_len remembered positions, then the segment's own: query i is at distance 0 from key mem_len + i.
    One integer per query thus hides an unfilled memory, another document and a lane's past before its reset alike.

    Args:
        lookback: int64 [lanes, length], how many tokens back each position may look.
        mem_len: number of remembered positions, filled or not.
        dtype: dtype of the scores.
    """

    lookback: Tensor
    mem_len: int
    dtype: torch.dtype = torch.float32

    @cached_property
    def distance(self) -> Tensor:
        """Return how many tokens back each key lies from each query: int64 [length, mem_len + length]."""
        length = self.lookback.size(1)
        device = self.lookback.device
        query = torch.arange(self.mem_len, self.mem_len + length, device=device)
        return query[:, None] - torch.arange(self.mem_len + length, device=device)

    @cached_property
    def visible(self) -> Tensor:
        """Return whether a query sees a key: bool [lanes, length, mem_len + length]."""
        return (self.distance >= 0) & (self.distance <= self.lookback[:, :, None])

    @cached_property
    def mask(self) -> Tensor:
        """Return what is added to scores, [lanes, length, mem_len + length]: 0 where a key is seen, else -inf."""
        return torch.zeros_like(self.visible, dtype=self.dtype).masked_fill_(~self.visible, -torch.inf)


def skew(by_distance: Tensor) -> Tensor:
    """Turn scores by distance into scores by key, without a copy (Dai et al. 2019, appendix B).

    Query i of n has distance d in column keys - 1 - d and wants it at key keys - n + i - d, n - 1 - i columns further
    left. Leaving out the first n - 1 numbers and reading on in rows one shorter does just this: it moves the first row
    by n - 1, and each following one by one less. The scores at future keys are meaningless and must be masked.

    Args:
        by_distance: [..., length, keys + 1], contiguous in these two; the columns are distances keys - 1, ..., 0, -1.

    Returns:
        A view [..., length, keys].
    """
    *batch, length, columns = by_distance.shape
    keys = columns - 1
    return by_distance.flatten(-2).narrow(-1, length - 1, length * keys).view(*batch, length, keys)


def position_scores(relative: RelativePositions) -> Tensor:
    """Compute skew(position r^T + bias) / sqrt(d_head): [n_head, lanes, length, keys].

    Heads come before lanes: r is common to all lanes, so that one product per head does for all of them.
    """
    position, r, bias = relative
    lanes, length, n_head, d_head = position.shape
    scale = d_head**-0.5
    by_distance = (position * scale).movedim(-2, 0).flatten(1, 2) @ r.permute(1, 2, 0)
    if bias is not None:
        by_distance = by_distance + bias.T[:, None] * scale
    return skew(by_distance.view(n_head, lanes, length, -1))


def keys_and_values(past: Tensor | None, present: Tensor) -> tuple[Tensor, Tensor]:
    """Join past and present: keys, and values, [lanes, keys, n_head, d_head] each."""
    parts = [x.movedim(0, -3) for x in (past, present) if x is not None]
    key, value = (parts[0] if past is None else torch.cat(parts, dim=1)).unbind(-3)
    return key, value


def attention_weights(
    content: Tensor, key: Tensor, relative: RelativePositions | None, window: AttentionWindow
) -> Tensor:
    """Compute the softmax of the formula: [n_head x lanes, length, keys]."""
    lanes, length, n_head, d_head = content.shape
    # Heads, then lanes: for a single lane, and for a KVCache, these are views.
    queries, keys = (x.movedim(-2, 0).flatten(0, 1) for x in (content * d_head**-0.5, key))
    if relative is None:
        scores = queries @ keys.transpose(1, 2)
    else:
        scores = torch.baddbmm(position_scores(relative).flatten(0, 1), queries, keys.transpose(1, 2))
    # Added, not filled in: a probability of zero has no gradient to be masked. And not recorded: the gradient passes as
    # it is, but of a sum in place of a view autograd would copy it three times.
    scores.detach().view(n_head, lanes, length, -1).add_(window.mask)
    return scores.softmax(dim=-1)


def reference(
    content: Tensor,
    past: Tensor | None,
    present: Tensor,
    relative: RelativePositions | None,
    window: AttentionWindow,
    mask: Mask | None,
) -> Tensor:
    """Compute the formula as it is written, with scores and probabilities in memory."""
    lanes, length, n_head, d_head = content.shape
    key, value = keys_and_values(past, present)
    values = value.movedim(-2, 0).flatten(0, 1)
    probabilities = attention_weights(content, key, relative, window)
    if mask is not None:
        by_lane = probabilities.view(n_head, lanes, length, -1).transpose(0, 1)
        probabilities = drop(by_lane, mask).transpose(0, 1).flatten(0, 1)
    attended = probabilities @ values
    return attended.view(n_head, lanes, length, d_head).movedim(0, -2)


def sdpa(
    content: Tensor,
    past: Tensor | None,
    present: Tensor,
    relative: RelativePositions | None,
    window: AttentionWindow,
    mask: Mask | None,
) -> Tensor:
    """Compute it by torch's scaled_dot_product_attention, to which all but the content is added to the scores.

    It draws its own masks, of torch's generator: another split of the lanes has other ones.
    """
    added = window.mask[:, None]
    if relative is not None:
        added = added + position_scores(relative).movedim(0, 1)
    dropout = mask.p if mask else 0.0
    key, value = keys_and_values(past, present)
    queries, keys, values = (x.movedim(-2, 1) for x in (content, key, value))
    return F.scaled_dot_product_attention(queries, keys, values, added, dropout).movedim(1, -2)


def triton(
    content: Tensor,
    past: Tensor | None,
    present: Tensor,
    relative: RelativePositions | None,
    window: AttentionWindow,
    mask: Mask | None,
) -> Tensor:
    """Compute it by our fused kernels, which keep no probabilities in memory."""
    from txl_dist.models.layers import flash  # imports triton, which is not installed everywhere

    position, r, bias = relative or (None, None, None)
    attended: Tensor = flash.attend(content, position, past, present, r, bias, window.lookback, mask)
    return attended


BACKENDS: dict[str, Callable[..., Tensor]] = {"reference": reference, "sdpa": sdpa, "triton": triton}


def default_backend(device: torch.device, dtype: torch.dtype, dropout: float = 0.0) -> str:
    """Return the fastest backend of a device whose dropout belongs to lanes.

    On GPUs our kernels where triton is installed, but not in float32, for which registers are too few: there `sdpa`, or
    with dropout the formula itself. On a CPU the formula.
    """
    if device.type != "cuda":
        return "reference"
    if HAS_TRITON and dtype != torch.float32:
        return "triton"
    return "reference" if dropout else "sdpa"


def describe_backend(backend: str, device: torch.device, dtype: torch.dtype, dropout: float) -> str:
    """Return which backend computes, with a comma behind it, and a warning where its dropout is not by lane."""
    if backend == "auto":
        backend = default_backend(device, dtype, dropout)
    warning = " (whose dropout is another under another split)" if backend == "sdpa" and dropout else ""
    return f"attention by {backend}{warning}, "


def attend(
    backend: str,
    content: Tensor,
    past: Tensor | None,
    present: Tensor,
    relative: RelativePositions | None,
    window: AttentionWindow,
    mask: Mask | None,
) -> Tensor:
    """Compute attention by one of the `BACKENDS`, or by the default one of the device (auto).

    Arguments and result have the shapes given at the top of this file.
    """
    if backend == "auto":
        backend = default_backend(content.device, content.dtype, mask.p if mask else 0.0)
    return BACKENDS[backend](content, past, present, relative, window, mask)
