"""The tracker: what is logged goes to metrics.jsonl, the console and W&B."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Any

from txl_dist.config.schema import TrainJob
from txl_dist.distributed.preemption import Preempted
from txl_dist.tracking.console import ConsoleReporter
from txl_dist.tracking.metrics import MetricsFile
from txl_dist.tracking.weights_and_biases import WandbRun


class Tracker:
    """Tells one start of a run, from step `start` to `stop`. Only the first rank's tracker tells anything.

    Attributes:
        problems: why metrics could not be kept; the run is to end where there are some.
    """

    def __init__(self, job: TrainJob, start: int, stop: int, speaks: bool):
        self.problems: list[str] = []
        self.path = f"{job.run.dir}/metrics.jsonl"
        self.reporter = ConsoleReporter(start, stop, speaks)
        self.file: MetricsFile | None = None
        if speaks:
            with self.noted():
                self.file = MetricsFile(job.run.dir, start)
        self.wandb: WandbRun | None = None
        if speaks and job.tracking.mode != "disabled":
            self.wandb = WandbRun(job.run.dir, asdict(job), job.tracking, self.reporter.say)
        self.last: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any]) -> None:
        """Tell the metrics of a step: `step`, `tokens`, and any of train/*, valid/*, test/*."""
        self.last |= metrics
        if self.file:
            with self.noted():
                self.file.append(metrics)
        if self.wandb:
            self.wandb.log(metrics)
        self.reporter.log(metrics)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problems.append(f"{error.filename or self.path}: cannot be written: {error.strerror}")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.reporter.close()
        if self.wandb:
            self.wandb.finish(self.last, preempted=kind is Preempted)
