"""The memory of some layers and lanes, kept from step to step."""

import torch
from torch import Tensor

Rows = slice | Tensor  # a Tensor: int64 [rows], the numbers of the rows


class Memory:
    """Store what some layers remember of some lanes: [lanes, *shape] per layer.

    Double-buffered: reads see the last committed step, writes go to the next one, and `commit`, once per step, makes
    them current. So a recomputation within a step (activation checkpointing) reads what the first computation read, and
    writing a slot twice does no harm.

    Args:
        layers, lanes: the numbers of what is stored, in the order in which it is stored. Elsewhere a memory is known as
            (layer, lane).
    """

    def __init__(self, layers: range, lanes: range, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype):
        self.layers = layers
        self.lanes = lanes
        self.current = torch.zeros((len(layers), len(lanes), *shape), device=device, dtype=dtype)
        self.next = torch.zeros_like(self.current)

    def read(self, rows: Rows) -> list[Tensor]:
        """Return the committed memory of some rows: for each layer [rows, *shape]."""
        return list(self.current[:, rows])

    def write(self, rows: Rows, memory: list[Tensor]) -> None:
        """Store the next step's memory of some rows: for each layer [rows, *shape]."""
        for layer, states in enumerate(memory):
            self.next[layer, rows] = states

    def commit(self) -> None:
        """Make what has been written current."""
        self.current, self.next = self.next, self.current

    def by_name(self) -> dict[str, Tensor]:
        """Return each memory under its identity: `layer.L.lane.N` -> [*shape]."""
        return {
            f"layer.{layer}.lane.{lane}": self.current[i, row]
            for i, layer in enumerate(self.layers)
            for row, lane in enumerate(self.lanes)
        }
