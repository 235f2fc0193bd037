"""How fast a run is, and how long it waits for data."""

import contextlib
import time
from collections.abc import Iterator

from txl_dist.data.segments import Segments


class Meter:
    """Measures training from one reading to the next, without the time spent `paused` (evaluation, checkpoints)."""

    def __init__(self, segments: Segments, step: int, tokens_per_step: int):
        self.segments, self.tokens_per_step = segments, tokens_per_step
        self._restart(step)

    def _restart(self, step: int) -> None:
        self.step, self.waited, self.began = step, self.segments.waited, time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """Tokens a second of all ranks, and the share of the time spent waiting for data, since the last reading."""
        seconds = time.perf_counter() - self.began
        told = {
            "train/tokens_per_second": (step - self.step) * self.tokens_per_step / seconds,
            "train/data_wait": (self.segments.waited - self.waited) / seconds,
        }
        self._restart(step)
        return told

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self.began += time.perf_counter() - since
