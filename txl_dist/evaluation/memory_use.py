"""What a model's memory is good for: how much it lowers the loss, how much attention it gets, and how old that is.

The first segments of a split are read twice with the same weights: with memory, and each segment alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from txl_dist.data.lanes import LanePlan
from txl_dist.data.segments import NOT_SCORED, Segment, SegmentLoader
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.models.base import Batch
from txl_dist.models.layers.attention_weights import AttentionWeights

AHEAD = "ahead"  # where a number of tokens back is negative
MEASURED = 4  # segments of each lane, behind those that fill the memory

ShowLosses = Callable[[Tensor, Batch], None]  # nats [lanes, targets], and the batch that they are of
ShowAttention = Callable[[int, AttentionWeights], None]  # with the layer's number in the whole model
Read = Callable[[Iterable[Segment], ShowLosses, ShowAttention | None], None]  # from empty memories


def measure_memory_use(read: Read, loader: SegmentLoader, lookback: int, group: ProcessGroup) -> dict[str, float]:
    """Return metrics of the memory (tracking/schema.py); none where the split is too short. Every rank must call it.

    Args:
        read: has a model read segments of this rank's lanes.
        loader: of a split, of which the first segments are read.
        lookback: how many tokens before a segment the memory may hold.
    """
    plan = loader.plan
    assert isinstance(plan, LanePlan)
    whole_segments = min(len(plan.part(lane)) for lane in range(plan.num_lanes)) // plan.tgt_len
    loader.stop = min(-(-lookback // plan.tgt_len) + MEASURED, whole_segments)
    filling = max(1, loader.stop - MEASURED)
    segments = list(loader)
    use = MemoryUse()
    read(use.measuring(segments, filling), use.add_losses_with_memory, use.add_attention)
    read(map(alone, segments[filling:]), use.add_losses_without_memory, None)
    return use.metrics(group)


def alone(segment: Segment) -> Segment:
    """Return a segment in which no position looks back beyond its beginning."""
    return replace(segment, lookback=np.minimum(segment.lookback, np.arange(segment.lookback.shape[1])))


class MemoryUse:
    """Adds up what is seen of a model that reads, by key: a total, and the weight of what it is the total of."""

    def __init__(self) -> None:
        self.sums: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        self.is_measuring = True

    def measuring(self, segments: Iterable[Segment], filling: int) -> Iterator[Segment]:
        """Yield segments; what is seen of the first `filling` ones, while memory is filled, does not count."""
        for number, segment in enumerate(segments):
            self.is_measuring = number >= filling
            yield segment

    def add(self, key: str, total: Tensor | float, weight: Tensor | float) -> None:
        """Add to the sums of a key."""
        old_total, old_weight = self.sums[key]
        self.sums[key] = (old_total + float(total), old_weight + float(weight))

    # --------------------------------------------------------------------------------------------------- losses

    def add_losses_with_memory(self, nats: Tensor, batch: Batch) -> None:
        """Add the losses of a segment that was read with memory."""
        if self.is_measuring:
            self.add_losses("with", nats, batch)

    def add_losses_without_memory(self, nats: Tensor, batch: Batch) -> None:
        """Add the losses of a segment that was read alone."""
        self.add_losses("without", nats, batch)

    def add_losses(self, how: str, nats: Tensor, batch: Batch) -> None:
        """Add the losses of a segment, all together and by position."""
        is_scored = batch["targets"] != NOT_SCORED
        positions = batch.get("positions", torch.arange(nats.size(1)).expand(nats.shape))
        losses = nats.detach().cpu().double()
        self.add(how, losses.sum(), is_scored.sum())
        for start, is_inside in stretches(positions):
            counted = is_inside & is_scored
            self.add(f"{how}/{start}", losses[counted].sum(), counted.sum())

    # ------------------------------------------------------------------------------------------------ attention

    def add_attention(self, layer: int, seen: AttentionWeights) -> None:
        """Add where the rows of a segment look in one layer."""
        if not self.is_measuring:
            return
        weights = seen.weights.detach()  # of a large model too many for a copy in float64
        on_memory = weights[..., : seen.mem_len]
        totals = sum_by_head(weights)
        for head, (share, total) in enumerate(zip(sum_by_head(on_memory), totals, strict=True)):
            self.add("share", share, total)
            self.add(f"share/layer.{layer}.head.{head}", share, total)
        for start, is_inside in stretches(seen.distance):
            shares = sum_by_head(weights * is_inside[:, None])
            if start == AHEAD and not any(shares):  # of a model that reads from left to right
                continue
            for head, (share, total) in enumerate(zip(shares, totals, strict=True)):
                self.add(f"distance/layer.{layer}.head.{head}.from.{start}", share, total)
        by_key = on_memory.sum(1, dtype=torch.float64)  # [lanes, rows, mem_len]
        self.add(f"age/layer.{layer}", (by_key * seen.distance[..., : seen.mem_len]).sum(), by_key.sum())
        if seen.memory is not None:
            norms = seen.memory.double().norm(dim=-1)
            self.add(f"norm/layer.{layer}", (by_key.sum(1) * norms).sum(), by_key.sum())

    # -------------------------------------------------------------------------------------------------- metrics

    def metrics(self, group: ProcessGroup) -> dict[str, float]:
        """Return the metrics of all ranks together; every rank must call it."""
        whole = MemoryUse()
        for sums in group.all_gather(dict(self.sums)):
            for key, (total, weight) in sums.items():
                whole.add(key, total, weight)
        means = {key: total / weight for key, (total, weight) in whole.sums.items() if weight}
        metrics = {}
        for key, mean in sorted(means.items()):
            how, _, start = key.partition("/")
            if how == "without":
                metrics["memory/gain" + (f"/from.{start}" if start else "")] = (
                    mean - means[key.replace("without", "with")]
                )
            elif how != "with":
                metrics[f"memory/{key}"] = mean
        return metrics


def sum_by_head(weights: Tensor) -> list[float]:
    """Add up [lanes, n_head, rows, keys] in float64, for each head."""
    sums: list[float] = weights.sum((0, 2, 3), dtype=torch.float64).tolist()
    return sums


def stretches(numbers: Tensor) -> Iterator[tuple[int | str, Tensor]]:
    """Sort numbers by size: yield the first number of each stretch, and which ones are in it.

    The stretches are 0, 1 to 3, 4 to 15, 16 to 63 and so on, and below 0 AHEAD.
    """
    if (numbers < 0).any():
        yield AHEAD, numbers < 0
    start, end = 0, 1
    while start <= int(numbers.max()):
        yield start, (numbers >= start) & (numbers < end)
        start, end = end, 4 * end
