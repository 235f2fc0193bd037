"""What records a run: its metrics and events, in files of the run directory, on the console and in trackers."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Any, Protocol

from txl_dist.config.schema import TrainJob
from txl_dist.distributed.preemption import Preempted
from txl_dist.tracking.console import ConsoleReporter
from txl_dist.tracking.dashboard.dashboard import DashboardFile
from txl_dist.tracking.events import EndReason, Event, EventsFile, make_event
from txl_dist.tracking.metrics import MetricsFile
from txl_dist.tracking.services.trackio_run import TrackioRun
from txl_dist.tracking.services.wandb_run import WandbRun


class Service(Protocol):
    """A tracker outside the run directory. Whatever goes wrong there is one line, never an error."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step."""

    def record(self, event: Event) -> None:
        """Show an event (tracking/events.py), in a way of its own or not at all."""

    def finish(self, end: EndReason) -> None:
        """End this start of the run."""


class Tracker:
    """Records one start of a run, from step `start`, when `tokens` have been read, to `stop`.

    Args:
        records: whether this is the rank that records, rank zero; the tracker of any other rank does nothing.

    Attributes:
        problems: why files could not be written; the run must end if there are any.
    """

    def __init__(self, job: TrainJob, start: int, tokens: int, stop: int, records: bool):
        self.problems: list[str] = []
        self.reporter = ConsoleReporter(start, stop, records)
        self.metrics: MetricsFile | None = None
        self.events: EventsFile | None = None
        self.dashboard = DashboardFile(job.run.dir) if records else None
        if records:
            with self.failure_noted(job.run.dir):
                self.metrics = MetricsFile(job.run.dir, start)
                self.events = EventsFile(job.run.dir)
        self.services = list(services(job)) if records else []
        self.last: dict[str, Any] = {"step": start, "tokens": tokens}
        self.ending = threading.Lock()  # taken by the first that ends it

    def log(self, metrics: dict[str, Any]) -> None:
        """Record the metrics of a step: `step`, `tokens`, and what tracking/schema.py declares."""
        metrics = metrics | {"time": round(time.time(), 3)}
        self.last |= metrics
        if self.metrics:
            with self.failure_noted(str(self.metrics.path)):
                self.metrics.append(metrics)
        for service in self.services:
            service.log(metrics)
        self.reporter.log(metrics)
        if self.dashboard and ("valid/loss" in metrics or "test/loss" in metrics):
            self.dashboard.update()

    def record(self, kind: str, step: int, tokens: int, **facts: Any) -> None:
        """Record an event (tracking/events.py)."""
        event = make_event(kind, step, tokens, **facts)
        if self.events:
            with self.failure_noted(str(self.events.path)):
                self.events.append(event)
        for service in self.services:
            service.record(event)
        self.reporter.record(event)

    @contextlib.contextmanager
    def failure_noted(self, path: str) -> Iterator[None]:
        """Add an OSError in this context to `problems`, with this path where it names none."""
        try:
            yield
        except OSError as error:
            self.problems.append(f"{error.filename or path}: cannot be written: {error.strerror}")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.end("ended")
        else:
            self.end("preempted" if kind is Preempted else "failed", str(error))

    def end(self, reason: EndReason, detail: str = "") -> None:
        """Record the end of this start, once: where a run stalls, the watchdog does so in a thread of its own."""
        if not self.ending.acquire(blocking=False):
            return
        self.record("end", self.last["step"], self.last["tokens"], reason=reason, detail=detail)
        if self.dashboard:
            self.dashboard.write()
        self.reporter.close()
        for service in self.services:
            service.finish(reason)


def services(job: TrainJob) -> Iterator[Service]:
    """Start the trackers that the config asks for."""
    if "wandb" in job.tracking.to and job.tracking.mode != "disabled":
        yield WandbRun(job.run.dir, asdict(job), job.tracking)
    if "trackio" in job.tracking.to:
        yield TrackioRun(job.run.dir, asdict(job), job.tracking)
