"""Throughput of a run, and how long it waits for data and checkpoints."""

import contextlib
import time
from collections.abc import Iterator

from txl_dist.data.segments import SegmentLoader


class ThroughputMeter:
    """Measures training from one reading to the next, without the time spent `paused` (evaluation, checkpoints).

    Args:
        step: the last step that is done already.
        flops_per_step: the model FLOPs of a training step.
        peak_flops: FLOP/s of all ranks' devices together; None: not known.
    """

    def __init__(
        self, segments: SegmentLoader, step: int, tokens_per_step: int, flops_per_step: float, peak_flops: float | None
    ):
        self.segments = segments
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        self.peak_flops = peak_flops
        self.step = step
        self.began = time.perf_counter()
        self.waited = segments.waited
        self.saved = 0.0

    def restart(self, step: int) -> None:
        """Measure from here on, when `step` steps are done."""
        self.step = step
        self.began = time.perf_counter()
        self.waited = self.segments.waited
        self.saved = 0.0

    def read(self, step: int) -> dict[str, float]:
        """Return what was measured since the last reading, and restart.

        Tokens per second of all ranks; the share of the time spent waiting for data; the seconds that training has
        waited for checkpoints. Where the peak is known also the model FLOPs utilisation, the share of the peak that the
        model makes use of (Chowdhery et al. 2022, appendix B).
        """
        seconds = time.perf_counter() - self.began
        steps_per_second = (step - self.step) / seconds
        metrics = {
            "train/tokens_per_second": steps_per_second * self.tokens_per_step,
            "train/data_wait": (self.segments.waited - self.waited) / seconds,
            "train/checkpoint_wait": self.saved,
        }
        if self.peak_flops:
            metrics["train/mfu"] = steps_per_second * self.flops_per_step / self.peak_flops
        self.restart(step)
        return metrics

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Enter around what is not training."""
        since = time.perf_counter()
        yield
        self.began += time.perf_counter() - since

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Enter around what waits for a checkpoint, within `paused`."""
        since = time.perf_counter()
        yield
        self.saved += time.perf_counter() - since
