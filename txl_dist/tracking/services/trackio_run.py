"""The Trackio run of a run directory: Hugging Face's tracker, which needs neither an account nor a network."""

import contextlib
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from txl_dist.config.schema import TrackingConfig
from txl_dist.errors import first_line
from txl_dist.tracking.events import EndReason, Event
from txl_dist.tracking.services.alerts import alert_of
from txl_dist.tracking.services.time_limit import SERVER, within

log = logging.getLogger(__name__)

PROJECT = "txl_dist"


class TrackioRun:
    """Logs to Trackio over steps, with tokens as a value to show others over; a run that resumes is continued by name.

    Its files are in RUN_DIR/trackio, or in TRACKIO_DIR where that is set. Whatever goes wrong is one line, and then it
    is left out.

    Attributes:
        broken: whether Trackio is left out.
    """

    def __init__(self, run_dir: str, config: dict[str, Any], tracking: TrackingConfig):
        self.broken = False
        self._try(lambda: self.start(run_dir, config, tracking))

    def start(self, run_dir: str, config: dict[str, Any], tracking: TrackingConfig) -> None:
        """Start Trackio's run; raise whatever Trackio raises."""
        os.environ.setdefault("TRACKIO_DIR", str(Path(run_dir).resolve() / "trackio"))  # is read by the import
        import trackio  # an optional package, which config/checks.py has found

        self.trackio = trackio
        self.run = trackio.init(
            project=tracking.project or PROJECT,
            name=tracking.name or Path(run_dir).resolve().name,
            group=tracking.group,
            config=config,
            resume="allow",
        )

    def log(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step; Trackio has times of its own."""
        values = {key: value for key, value in metrics.items() if key not in ("step", "time")}
        self._try(lambda: self.run.log(values, step=metrics["step"]))

    def record(self, event: Event) -> None:
        """Show samples as a table of their step; send an alert for a bad step and for the end of a start."""
        if event["event"] == "samples":
            self._try(lambda: self._log_samples(event))
        alert = alert_of(event)
        if alert:
            level = alert.level
            self._try(lambda: self.run.alert(alert.title, alert.text, level=self.trackio.AlertLevel[level]))

    def finish(self, end: EndReason) -> None:
        """Write what is not written yet."""
        self._try(lambda: within(SERVER, self.run.finish))

    def _log_samples(self, event: Event) -> None:
        rows = [[sample["prompt"], sample["text"]] for sample in event["samples"]]
        table = self.trackio.Table(columns=["prompt", "text"], data=rows)
        self.run.log({"tokens": event["tokens"], "samples": table}, step=event["step"])

    def _try(self, action: Callable[[], Any]) -> None:
        """Do something, and leave Trackio out from now on if that fails; what it prints is kept from the console."""
        if self.broken:
            return
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                action()
        except Exception as error:
            self.broken = True
            log.warning(
                f"Trackio is left out ({first_line(error)}); training continues, and metrics.jsonl has everything"
            )
