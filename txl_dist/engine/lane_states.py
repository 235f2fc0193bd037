"""The states of some layers and lanes, kept from step to step."""

import torch
from torch import Tensor
from torch.nn import functional as F

from txl_dist.models.base import Shapes
from txl_dist.models.layers.state import State

Rows = slice | Tensor  # a Tensor: int64 [rows], the numbers of the rows
Tensors = list[dict[str, Tensor]]  # of each layer by name, [lanes, *shape]


class LaneStates:
    """Store what some layers remember of some lanes.

    Double-buffered: reads see the last committed step, writes go to the next one, and `commit`, once per step, makes
    them current. So a recomputation within a step (activation checkpointing) reads what the first computation read, and
    writing a slot twice does no harm.

    Args:
        layers, lanes: the numbers of what is stored, in the order in which it is stored. Elsewhere a state is known as
            (layer, lane, name).
        shapes: of each layer's states of one lane.
    """

    def __init__(self, layers: range, lanes: range, shapes: list[Shapes], device: torch.device, dtype: torch.dtype):
        self.device = device
        self.layers = layers
        self.lanes = lanes
        self.current: Tensors = [
            {name: torch.zeros((len(lanes), *shape), device=device, dtype=dtype) for name, shape in of_layer.items()}
            for of_layer in shapes
        ]
        self.next: Tensors = [
            {name: torch.zeros_like(states) for name, states in of_layer.items()} for of_layer in self.current
        ]

    def read(self, rows: Rows) -> list[State]:
        """Return the committed states of some rows, for each layer by name [rows, *shape]."""
        return [{name: states[rows] for name, states in of_layer.items()} for of_layer in self.current]

    def write(self, rows: Rows, memory: list[State]) -> None:
        """Store the next step's states of some rows, for each layer by name [rows, *shape].

        A slice of all lanes is not copied: its states must stay as they are from now on.
        """
        for of_layer, new in zip(self.next, memory, strict=True):
            for name, states in of_layer.items():
                value = new[name]
                assert isinstance(value, Tensor)  # a cache is for evaluation
                if isinstance(rows, slice) and value.shape == states.shape and owns_storage(value):
                    of_layer[name] = value
                else:
                    states[rows] = value

    def commit(self) -> None:
        """Make what has been written current."""
        self.current, self.next = self.next, self.current

    def spoilt_lanes(self) -> Tensor:
        """Return whether anything that has been written of a lane is not finite: bool [lanes]."""
        spoilt = torch.zeros(len(self.lanes), dtype=torch.bool, device=self.device)
        for of_layer in self.next:
            for states in of_layer.values():
                spoilt |= ~states[:, None].isfinite().flatten(1).all(dim=1)
        return spoilt

    def keep(self, rows: Tensor) -> None:
        """Have the next step read the committed states of some rows once more; rows: bool [lanes]."""
        for old, new in zip(self.current, self.next, strict=True):
            for name, states in new.items():
                states[rows] = old[name][rows]

    def drift(self) -> dict[int, float]:
        """Return for each layer the sum over lanes of the cosine between the committed state and the one before it."""
        cosines = {}
        for layer, current, before in zip(self.layers, self.current, self.next, strict=True):
            if any(states.numel() for states in current.values()):
                now, then = (
                    torch.cat([states.float().flatten(1) for states in of_step.values()], dim=1)
                    for of_step in (current, before)
                )
                cosines[layer] = float(F.cosine_similarity(now, then).sum())
        return cosines

    def by_name(self) -> dict[str, Tensor]:
        """Return each state under its identity: `layer.L.lane.N` for `memory`, `layer.L.lane.N.NAME` for others."""
        named: dict[str, Tensor] = {}
        for layer, of_layer in zip(self.layers, self.current, strict=True):
            for name, states in of_layer.items():
                end = "" if name == "memory" else f".{name}"
                named |= {f"layer.{layer}.lane.{lane}{end}": states[row] for row, lane in enumerate(self.lanes)}
        return named


def owns_storage(tensor: Tensor) -> bool:
    """Return whether a tensor is contiguous, and all of its storage: to keep it keeps nothing else in memory."""
    num_bytes = tensor.numel() * tensor.element_size()
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == num_bytes
