"""Memory: the hidden states that each layer remembers of each lane; in evaluation the keys and values made of them."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

Rows = slice | Tensor  # a Tensor: int64 [rows], the numbers of the rows


class Memory:
    """Memories of some layers and of some lanes, [lanes, mem_len, d_model] a layer, oldest state first.

    Double-buffered: reads see the last committed step, writes go to the next one, and `commit`, once a step, makes them
    current. So what is computed again within a step (activation checkpointing) reads what it read the first time, and a
    slot written twice is none the worse.

    Args:
        layers, lanes: their numbers, in the order of their places here. Outside, what a place holds is known as
            (layer, lane).
    """

    def __init__(
        self, layers: range, lanes: range, mem_len: int, d_model: int, device: torch.device, dtype: torch.dtype
    ):
        self.layers, self.lanes = layers, lanes
        self.current = torch.zeros((len(layers), len(lanes), mem_len, d_model), device=device, dtype=dtype)
        self.next = torch.zeros_like(self.current)

    def read(self, rows: Rows) -> list[Tensor]:
        """The committed memory of some rows: a tensor [rows, mem_len, d_model] for each layer."""
        return list(self.current[:, rows])

    def write(self, rows: Rows, memory: list[Tensor]) -> None:
        """Put the next step's memory of some rows beside the current one."""
        for layer, states in enumerate(memory):
            self.next[layer, rows] = states

    def commit(self) -> None:
        self.current, self.next = self.next, self.current

    def by_name(self) -> dict[str, Tensor]:
        """Each memory under its identity: `layer.L.lane.N` -> [mem_len, d_model]."""
        return {
            f"layer.{layer}.lane.{lane}": self.current[place, row]
            for place, layer in enumerate(self.layers)
            for row, lane in enumerate(self.lanes)
        }


Told = TypeVar("Told")


class Cache:
    """Keys and values of a layer's last mem_len positions: its memory where weights stand still.

    They lie heads first, with room behind them, and new ones are appended there: nothing that is old is copied, but for
    all of it when the room is used up. So a cache goes one way only: what is remembered before a segment is gone after.

    Args:
        states: [2 (keys, values), n_head, lanes, mem_len, d_head], the first mem_len positions.
    """

    def __init__(self, states: Tensor):
        self.states, self.mem_len, self.end = states, states.size(-2), states.size(-2)
        self.told: tuple[Tensor, object] | None = None

    @property
    def remembered(self) -> Tensor:
        """The last mem_len positions, [2, n_head, lanes, mem_len, d_head]."""
        return self.states.narrow(-2, self.end - self.mem_len, self.mem_len)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[lanes, length, n_head, d_head] each -> the same of memory and segment, [lanes, mem_len + length, ...]."""
        length = key.size(1)
        if self.end + length > self.states.size(-2):
            *shape, _, d_head = self.states.shape
            kept, room = self.remembered, max(length, self.mem_len // 4)
            self.states, self.end = kept.new_empty(*shape, self.mem_len + room, d_head), self.mem_len
            self.remembered.copy_(kept)
        self.states.narrow(-2, self.end, length).copy_(torch.stack([key, value]).movedim(-2, 1))
        self.end += length
        keys, values = self.states.narrow(-2, self.end - self.mem_len - length, self.mem_len + length).movedim(1, -2)
        return keys, values

    def once(self, tell: Callable[[Tensor], Told], encoding: Tensor) -> Told:
        """What `tell` makes of an encoding, made anew only for another encoding than the last."""
        if self.told is None or self.told[0] is not encoding:
            self.told = encoding, tell(encoding)
        return self.told[1]  # type: ignore[return-value]


States = Tensor | Cache  # what one layer remembers
Remembered = TypeVar("Remembered", bound=States)


def side_by_side(memories: Iterable[list[States]]) -> list[States]:
    """One memory of the lanes of several, layer by layer."""
    joined: list[States] = []
    for parts in zip(*memories, strict=True):
        if isinstance(parts[0], Cache):
            joined.append(Cache(torch.cat([part.remembered for part in parts], dim=2)))
        else:
            joined.append(torch.cat(parts))
    return joined
