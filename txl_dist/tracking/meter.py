"""How fast a run is, and how long it waits for data."""

import contextlib
import time
from collections.abc import Iterator

from txl_dist.data.segments import Segments


class ThroughputMeter:
    """Measures training from one reading to the next, without the time spent `paused` (evaluation, checkpoints).

    Args:
        flops_per_step: the model FLOPs of a training step.
        peak: FLOP/s of all ranks' devices; None: not known.
    """

    def __init__(self, segments: Segments, step: int, tokens_per_step: int, flops_per_step: float, peak: float | None):
        self.segments, self.tokens_per_step = segments, tokens_per_step
        self.flops_per_step, self.peak = flops_per_step, peak
        self._restart(step)

    def _restart(self, step: int) -> None:
        self.step, self.waited, self.began = step, self.segments.waited, time.perf_counter()
        self.saved = 0.0

    def read(self, step: int) -> dict[str, float]:
        """Since the last reading: tokens a second of all ranks, the share of the time spent waiting for data, and the
        seconds that training has waited for checkpoints.

        And, where the peak is known, model FLOPs utilisation (Chowdhery et al. 2022, appendix B): the share of it that
        the model makes use of.
        """
        seconds = time.perf_counter() - self.began
        steps_per_second = (step - self.step) / seconds
        told = {
            "train/tokens_per_second": steps_per_second * self.tokens_per_step,
            "train/data_wait": (self.segments.waited - self.waited) / seconds,
            "train/checkpoint_wait": self.saved,
        }
        if self.peak:
            told["train/mfu"] = steps_per_second * self.flops_per_step / self.peak
        self._restart(step)
        return told

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self.began += time.perf_counter() - since

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around what waits for a checkpoint, within `paused`."""
        since = time.perf_counter()
        yield
        self.saved += time.perf_counter() - since
