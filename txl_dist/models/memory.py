"""Memory: the hidden states that each layer remembers of each lane."""

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
