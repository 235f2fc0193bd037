"""Memory: the hidden states that each layer remembers of each lane."""

import torch
from torch import Tensor

from txl_dist.config import ModelConfig


class Memory:
    """Memories of all layers and of some lanes, [lanes, mem_len, d_model] a layer, oldest state first.

    Double-buffered: reads see the last committed step, writes go to the next one, and `commit`, once a step, makes them
    current. So what is computed again within a step (activation checkpointing) reads what it read the first time, and a
    slot written twice is none the worse.

    Args:
        lanes: the lanes' numbers, in the order of their rows. What a row holds is known outside as (layer, lane).
    """

    def __init__(self, lanes: range, config: ModelConfig, device: torch.device, dtype: torch.dtype):
        self.lanes = lanes
        shape = (config.n_layer, len(lanes), config.mem_len, config.d_model)
        self.current = torch.zeros(shape, device=device, dtype=dtype)
        self.next = torch.zeros_like(self.current)

    def read(self, rows: slice) -> list[Tensor]:
        """The committed memory of some rows: n_layer tensors [rows, mem_len, d_model]."""
        return list(self.current[:, rows])

    def write(self, rows: slice, memory: list[Tensor]) -> None:
        """Put the next step's memory of some rows beside the current one."""
        for layer, states in enumerate(memory):
            self.next[layer, rows] = states

    def commit(self) -> None:
        self.current, self.next = self.next, self.current

    def by_name(self) -> dict[str, Tensor]:
        """Each memory under its identity: `layer.L.lane.N` -> [mem_len, d_model]."""
        return {
            f"layer.{layer}.lane.{lane}": self.current[layer, row]
            for layer in range(len(self.current))
            for row, lane in enumerate(self.lanes)
        }
