"""Look at where attention goes: sublayers show their weights to an observer, if they have one."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionWeights:
    """Where the rows of a segment look in one layer.

    Attributes:
        weights: [lanes, n_head, rows, keys]; those of a row have the sum 1, or 0 where it sees no key. Keys are the
            remembered positions, then the segment's own.
        distance: int64 [lanes or 1, rows, keys], how many tokens back a key lies from the row; negative: ahead of it.
        mem_len: number of remembered positions, filled or not.
        memory: [lanes, mem_len, d_model], the remembered states; None where only their keys and values are kept.
    """

    weights: Tensor
    distance: Tensor
    mem_len: int
    memory: Tensor | None


class ObservableAttention(nn.Module):
    """An attention sublayer that shows where it looks.

    Attributes:
        observer: is called with the weights of each segment; None: nobody looks, and nothing is computed for it.
    """

    observer: Callable[[AttentionWeights], None] | None = None
