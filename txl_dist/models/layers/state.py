"""The state that a layer carries from segment to segment: hidden states, or in evaluation keys and values."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

RelativeTerms = tuple[Tensor, Tensor | None]  # r and bias of backends.RelativePositions


class Cache(ABC):
    """What a layer remembers in evaluation, written in place: reading on from it takes its content."""

    @abstractmethod
    def copy(self) -> "Cache":
        """Return a cache of the same content, which goes on alone."""

    @abstractmethod
    def concat(self, others: Sequence[Any]) -> "Cache":
        """Return a cache of the lanes of this one and then of the others."""


class KVCache(Cache):
    """Keep keys and values of a layer's last mem_len positions: its memory while weights do not change.

    They lie heads first, with room behind them where new ones are appended: nothing old is copied until the room is
    used up, and all of it then. So a cache only goes forward: what it held before a segment is gone afterwards.

    Args:
        states: [2 (keys, values), n_head, lanes, mem_len, d_head], the first mem_len positions.
    """

    def __init__(self, states: Tensor):
        self.states = states
        self.mem_len = states.size(-2)
        self.end = self.mem_len
        self._terms: tuple[Tensor, RelativeTerms | None] | None = None

    @property
    def remembered(self) -> Tensor:
        """Return the last mem_len positions, [2, n_head, lanes, mem_len, d_head]."""
        return self.states.narrow(-2, self.end - self.mem_len, self.mem_len)

    def append(self, key: Tensor, value: Tensor) -> Tensor:
        """Append a segment, and return keys and values of memory and segment together.

        Args:
            key, value: [lanes, length, n_head, d_head].

        Returns:
            [2 (keys, values), lanes, mem_len + length, n_head, d_head], a view.
        """
        length = key.size(1)
        if self.end + length > self.states.size(-2):
            self._move_to_new_room(max(length, self.mem_len // 4))
        self.states.narrow(-2, self.end, length).copy_(torch.stack([key, value]).movedim(-2, 1))
        self.end += length
        return self.states.narrow(-2, self.end - self.mem_len - length, self.mem_len + length).movedim(1, -2)

    def _move_to_new_room(self, room: int) -> None:
        """Copy what is remembered to the beginning of a new tensor, with room for so many positions behind it."""
        remembered = self.remembered
        *shape, _, d_head = self.states.shape
        self.states = remembered.new_empty(*shape, self.mem_len + room, d_head)
        self.end = self.mem_len
        self.remembered.copy_(remembered)

    def copy(self) -> "KVCache":
        """Return a cache of what is remembered."""
        return KVCache(self.remembered.clone())

    def concat(self, others: Sequence[Any]) -> "KVCache":
        """Return a cache of what this one and the others remember of their lanes."""
        return KVCache(torch.cat([cache.remembered for cache in (self, *others)], dim=2))

    def forget(self, positions: int) -> None:
        """Forget the last positions that were appended, and remember as many older ones."""
        self.end -= positions

    def memoise(self, project: Callable[[Tensor], RelativeTerms | None], encoding: Tensor) -> RelativeTerms | None:
        """Return `project(encoding)`, computed once for as long as the encoding is the same tensor."""
        if self._terms is None or self._terms[0] is not encoding:
            self._terms = encoding, project(encoding)
        return self._terms[1]


class FixedKVCache(KVCache):
    """A KVCache that stays where it is, and of which nothing changes in Python: a CUDA graph can append to it.

    Every segment costs a copy of what is remembered, on a GPU less than to launch each kernel of the layer.
    """

    def append(self, key: Tensor, value: Tensor) -> Tensor:
        """Append a segment; arguments and result are those of `KVCache.append`."""
        segment = torch.stack([key, value]).movedim(-2, 1)
        both = torch.cat([self.states, segment], dim=-2)
        self.states.copy_(both.narrow(-2, key.size(1), self.mem_len))
        return both.movedim(1, -2)


StateValue = Tensor | Cache  # a Tensor: [lanes, ...]
State = dict[str, StateValue]  # what a layer remembers of some lanes, by name


def concat_lanes(memories: Iterable[list[State]]) -> list[State]:
    """Join the states of several batches of lanes, layer by layer, into those of one batch."""
    return [
        {name: concat_values([state[name] for state in states]) for name in states[0]}
        for states in zip(*memories, strict=True)
    ]


def concat_values(values: list[StateValue]) -> StateValue:
    """Join what is remembered of several batches of lanes under one name."""
    first, *others = values
    if isinstance(first, Cache):
        return first.concat(others)
    return torch.cat([value for value in values if isinstance(value, Tensor)])
