"""The tracker: what is logged goes to metrics.jsonl, the console and W&B."""

from dataclasses import asdict
from types import TracebackType
from typing import Any

from txl_dist.config import TrainJob
from txl_dist.tracking.console import Screen
from txl_dist.tracking.metrics import MetricsFile
from txl_dist.tracking.weights_and_biases import WandbRun


class Tracker:
    """Tells one start of a run, from step `start` to `stop`. Only the first rank's tracker tells anything."""

    def __init__(self, job: TrainJob, start: int, stop: int, speaks: bool):
        self.screen = Screen(start, stop, speaks)
        self.file = MetricsFile(job.run.dir, start) if speaks else None
        self.wandb: WandbRun | None = None
        if speaks and job.tracking.mode != "disabled":
            self.wandb = WandbRun(job.run.dir, asdict(job), job.tracking)
            if self.wandb.note:
                self.screen.say(self.wandb.note)
        self.last: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any]) -> None:
        """Tell the metrics of a step: `step`, `tokens`, and any of train/*, valid/*, test/*."""
        self.last |= metrics
        if self.file:
            self.file.append(metrics)
        if self.wandb:
            self.wandb.log(metrics)
        self.screen.log(metrics)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.screen.close()
        if self.wandb:
            self.wandb.finish(self.last)
