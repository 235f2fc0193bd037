"""What goes on inside the optimization, part by part: norms of weights, gradients and updates, sizes of activations.

A part is a layer, `layer.N` with its number in the whole model, or another module, such as `embedding`; the names of
parameters say which part they belong to. Each rank measures its own shards and lanes: nothing is put together that
training has cut, and a few numbers per part cross the network. Shards are copied, for the updates, at watched steps
only.
"""

import math
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.engine.deepspeed_internals import Shard
from txl_dist.engine.sharded_state import ShardedState
from txl_dist.models.base import LanguageModel

OF_PARAMETERS = ("weights", "gradients", "updates")
LAYER = re.compile(r"layers\.(\d+)\.")


class LayerWatch:
    """Measures every part of a model at the steps that are multiples of `every`.

    Args:
        every: tracking.watch_every; None: no step is watched.
        model: the layers of this rank, which have the numbers `layers` in the whole model.
        names: of all parameters of the whole model; a tied one belongs to the part of its first name.

    Attributes:
        metrics: of the current step, `watch/...` of tracking/schema.py; empty where it is not watched. The gradients of
            a step that DeepSpeed has skipped are NaN.
    """

    def __init__(
        self,
        every: int | None,
        model: LanguageModel,
        layers: range,
        names: Iterable[str],
        state: ShardedState,
        group: ProcessGroup,
    ):
        self.every = every
        self.model = model
        self.layers = layers
        self.parts = list(dict.fromkeys(map(part_of, names)))
        self.state = state
        self.group = group
        self.metrics: dict[str, float] = {}
        self._timer = Timer(group.device)
        self._forget()

    def _forget(self) -> None:
        """Forget what has been measured of a step."""
        self._is_watching = False
        self._shards: list[tuple[str, Shard]] = []  # with the part of each
        self._old_weights: list[Tensor] = []
        self._sums: dict[tuple[str, str], Tensor] = {}  # by quantity and part, of this rank
        self._largest: dict[str, Tensor] = {}  # absolute value of the activations of each part
        self._has_gradients = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Enter around the forward, backward and update of a step, numbered as in the log; every rank must."""
        self.metrics = {}
        if not self.every or number % self.every:
            yield
            return
        with self._timer.running():
            self._is_watching = True
            self._shards = [(part_of(name), shard) for name, shard in self.state.shards().items()]
            self._old_weights = [shard.weights().clone() for _, shard in self._shards]
        self.model.activation_observer = self._read_activations
        try:
            yield
        finally:
            self.model.activation_observer = None
        with self._timer.running():
            self._read_weights()
            self.metrics = self._combine()
        self.metrics["watch/seconds"] = self._timer.read()
        self._forget()

    def read_gradients(self, optimizer: torch.optim.Optimizer, grad_norm: float | Tensor, clip: float) -> None:
        """Measure the gradients of what an optimizer is about to update; nothing at a step that is not watched.

        Args:
            optimizer: the inner one. DeepSpeed may let it update one group of parameters after the other.
            grad_norm: of the whole model, before clipping.
            clip: to which it is clipped by now; 0: it is not.
        """
        if not self._is_watching:
            return
        with self._timer.running():
            self._has_gradients = True
            # The factor by which both torch and DeepSpeed have divided.
            clipped_by = torch.as_tensor((grad_norm + 1e-6) / clip if clip else 1.0).clamp(min=1)
            updated = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
            for part, shard in self._shards:
                gradient = shard.gradient() if id(shard.tensor) in updated else None
                if gradient is not None:
                    self._add("gradients", part, norm(gradient) * clipped_by.to(gradient.device))

    def _read_activations(self, layer: int, activations: Tensor) -> None:
        """Measure what leaves a layer of this rank for some rows; a layer that is recomputed is not shown again."""
        with self._timer.running():
            part = f"layer.{self.layers[layer]}"
            self._add("activations", part, norm(activations))
            self._add("count", part, torch.tensor(activations.numel()).double().sqrt())
            largest = torch.linalg.vector_norm(activations, math.inf)
            # A maximum over ranks may miss a NaN, but no infinity; both are null in the log.
            largest = largest.nan_to_num(math.inf, posinf=math.inf)
            self._largest[part] = torch.maximum(largest, self._largest.get(part, largest))

    def _read_weights(self) -> None:
        for (part, shard), old_weights in zip(self._shards, self._old_weights, strict=True):
            weights = shard.weights()
            self._add("weights", part, norm(weights))
            self._add("updates", part, norm(old_weights.sub_(weights)))

    def _add(self, quantity: str, part: str, value: Tensor) -> None:
        """Add the square of a norm to the sum of a part."""
        before = self._sums.get((quantity, part), 0.0)
        self._sums[quantity, part] = before + value.to(self.group.device).square()

    def _combine(self) -> dict[str, float]:
        """Return the metrics of the whole model; every rank must call it."""
        layers = [part for part in self.parts if part.startswith("layer.")]
        cells = [(quantity, part) for quantity in OF_PARAMETERS for part in self.parts]
        cells += [(quantity, part) for quantity in ("activations", "count") for part in layers]
        nothing = torch.zeros((), dtype=torch.float64, device=self.group.device)
        sums = torch.stack([self._sums.get(cell, nothing) for cell in cells])
        largest = torch.stack([self._largest.get(part, nothing).double() for part in layers])
        dist.all_reduce(sums)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        sum_of = dict(zip(cells, sums.tolist(), strict=True))
        metrics = {}
        for quantity in OF_PARAMETERS:
            is_known = quantity != "gradients" or self._has_gradients
            for part in self.parts:
                metrics[f"watch/{quantity}/{part}"] = math.sqrt(sum_of[quantity, part]) if is_known else math.nan
        for part, maximum in zip(layers, largest.tolist(), strict=True):
            mean_square = sum_of["activations", part] / sum_of["count", part]
            metrics[f"watch/activations_rms/{part}"] = math.sqrt(mean_square)
            metrics[f"watch/activations_max/{part}"] = maximum
        return metrics


class Timer:
    """Adds up how long some work takes on a device, without waiting for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # around the work on a GPU

    @contextmanager
    def running(self) -> Iterator[None]:
        """Enter around the work."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began

    def read(self) -> float:
        """Return the seconds since the last reading; wait for the work."""
        seconds = self.seconds
        for begin, end in self.events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
        self.seconds = 0.0
        self.events = []
        return seconds


def part_of(name: str) -> str:
    """Return the part of a model that a parameter of the whole model belongs to: layer.N, or its first component."""
    layer = LAYER.match(name)
    return f"layer.{layer[1]}" if layer else name.partition(".")[0]


def norm(values: Tensor) -> Tensor:
    """Return the norm of a tensor, of which there may be many millions of values: float64 []."""
    return torch.linalg.vector_norm(values, dtype=torch.float64)
