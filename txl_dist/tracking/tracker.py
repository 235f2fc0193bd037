"""The tracker sends the metrics of a run to metrics.jsonl, the console and W&B."""

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
    """Records the metrics of one start of a run, from step `start` to `stop`.

    Args:
        records: whether this is the rank that records, rank zero; the tracker of any other rank does nothing.

    Attributes:
        problems: why metrics could not be written; the run must end if there are any.
    """

    def __init__(self, job: TrainJob, start: int, stop: int, records: bool):
        self.problems: list[str] = []
        self.path = f"{job.run.dir}/metrics.jsonl"
        self.reporter = ConsoleReporter(start, stop, records)
        self.file: MetricsFile | None = None
        if records:
            with self.failure_noted():
                self.file = MetricsFile(job.run.dir, start)
        self.wandb: WandbRun | None = None
        if records and job.tracking.mode != "disabled":
            self.wandb = WandbRun(job.run.dir, asdict(job), job.tracking)
        self.last: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any]) -> None:
        """Record the metrics of a step: `step`, `tokens`, and any of train/*, valid/*, test/*."""
        self.last |= metrics
        if self.file:
            with self.failure_noted():
                self.file.append(metrics)
        if self.wandb:
            self.wandb.log(metrics)
        self.reporter.log(metrics)

    @contextlib.contextmanager
    def failure_noted(self) -> Iterator[None]:
        """Add an OSError in this context to `problems`."""
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
