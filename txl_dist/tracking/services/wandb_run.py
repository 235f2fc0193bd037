"""The W&B run of a run directory."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from txl_dist.config.schema import TrackingConfig
from txl_dist.distributed.preemption import REQUEUE
from txl_dist.tracking.events import EndReason, Event, read_events
from txl_dist.tracking.metrics import read_metrics
from txl_dist.tracking.schema import AXES, PANELS
from txl_dist.tracking.services.alerts import alert_of
from txl_dist.tracking.services.time_limit import SERVER, within
from txl_dist.tracking.services.wandb_artifacts import log_checkpoints, use_dataset
from txl_dist.tracking.services.wandb_id import MAX_LENGTH, claim_run_id
from txl_dist.tracking.services.wandb_settings import (
    KEYS,
    OFFLINE,
    ONLINE,
    default_mode,
    given_keys,
    ignored_variables,
    reason,
)
from txl_dist.tracking.services.wandb_view import make_view

log = logging.getLogger(__name__)

PROJECT = "txl_dist"

# W&B's settings, unless the environment sets them. What cannot be sent at the end of a run waits in its folder for
# `wandb sync`; older releases ignore the time limits.
DEFAULTS = {"WANDB_SILENT": "true", "WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "300"}

EXIT_CODES = {"ended": 0, "preempted": REQUEUE, "rolled back": 0, "failed": 1}
SUMMARIES = {"lower": "min", "higher": "max"}  # Panel.better -> what W&B's table of runs shows beside the last value
COLUMNS = ["step", "tokens", "prompt", "text"]  # of the table of samples


class WandbRun:
    """Logs to W&B under one ID, kept in RUN_DIR/wandb_id, so that a run that resumes stays one run in W&B.

    Metrics are shown over tokens. W&B never stops training: if it cannot be reached the run is kept offline, and if it
    cannot be started or breaks it is left out. A warning says so, and metrics.jsonl has what W&B lacks.

    Attributes:
        broken: whether W&B is left out.
        offline: whether metrics stay in RUN_DIR/wandb until `wandb sync` sends them.
        samples: the table of samples; None before the first of this start.
    """

    def __init__(self, run_dir: str, config: dict[str, Any], tracking: TrackingConfig):
        self.run_dir = run_dir
        self.broken = False
        self.offline = False
        self.samples: Any = None
        try:
            self.start(run_dir, config, tracking)
        except Exception as error:  # W&B's own, the operating system's, or any other of a package that is broken
            self.broken = True
            log.warning(f"W&B is left out ({reason(error)}); training continues, and metrics.jsonl has everything")

    def start(self, run_dir: str, config: dict[str, Any], tracking: TrackingConfig) -> None:
        """Start W&B's run, offline if the server cannot be reached; raise whatever W&B raises."""
        import wandb  # only rank zero of a run that is not disabled needs it

        self.wandb: Any = wandb
        logging.raiseExceptions = False  # on a full disk W&B's own log would print a trace for each of its lines
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        with contextlib.redirect_stderr(io.StringIO()) as errors:  # a trace, if a settings file is wrong
            settings = wandb.setup().settings  # of the environment and of W&B's files
        for line in errors.getvalue().splitlines()[:1]:
            log.warning(f"W&B: {line.removeprefix('wandb: ')}")
        mode = tracking.mode if tracking.mode != "auto" else default_mode(settings)
        options: dict[str, Any] = {
            "mode": mode,
            "project": settings.project or PROJECT,
            "name": settings.run_name or Path(run_dir).resolve().name[:MAX_LENGTH],
            "id": claim_run_id(run_dir, settings.run_id),
            "dir": run_dir,
            "resume": "allow",
        }
        for key, value in given_keys(tracking).items():
            options[KEYS[key].argument] = value
        ignored = list(ignored_variables(options))
        if ignored:
            log.warning(f"W&B: not taken from the environment: {'; '.join(ignored)}")
        try:
            self.run = wandb.init(**options, config=config)
        except Exception as error:
            if mode not in ONLINE:
                raise
            log.warning(f"W&B cannot be reached ({reason(error)}); this run is kept offline")
            wandb.teardown()
            mode = "offline"
            self.run = wandb.init(**options | {"mode": mode}, config=config)
        self.offline = mode in OFFLINE
        define_metrics(self.run)

    def log(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step.

        Each part of an offline run would count W&B's own steps from 0. So they are given, and parts that are synced one
        after the other do not overlap. They are not given online: W&B would drop rows below its last step, as are those
        that a run does again after a kill.
        """
        if not self.broken:
            with self._left_out_if_it_fails():
                self.run.log(metrics, step=metrics["step"] if self.offline else None)

    def record(self, event: Event) -> None:
        """Show samples in a table; send an alert for a bad step and for the end of a start."""
        if self.broken:
            return
        if event["event"] == "samples":
            with noted("the samples were not logged"):
                self._log_samples(event)
        alert = alert_of(event)
        if alert:  # W&B sends no second one of the same title within a minute
            with noted("no alert was sent"):
                self.run.alert(alert.title, alert.text, level=self.wandb.AlertLevel[alert.level])

    def finish(self, end: EndReason) -> None:
        """Log the checkpoints and the summary and end W&B's run; make its view after the first start that is online."""
        if not self.broken:
            if not self.run.disabled:
                with noted("the checkpoints were not logged"):
                    within(SERVER, lambda: log_checkpoints(self.wandb, self.run, self.run_dir))
                with noted("the dataset was not logged"):
                    within(SERVER, lambda: use_dataset(self.wandb, self.run, self.run_dir))
            with self._left_out_if_it_fails():
                if self.offline:
                    self.run.log({}, commit=True)  # the last row, which would change the summary afterwards
                self.run.summary.update(summarize(read_metrics(self.run_dir)))
                if end == "preempted":  # together with an exit code W&B shows it as preempted, not as finished
                    self.run.mark_preempting()
                self.run.finish(exit_code=EXIT_CODES[end])
        if not self.broken and not self.offline and not self.run.disabled and end == "ended":
            self._make_view()
        with contextlib.suppress(Exception, SystemExit):  # of a broken service; the next run starts another
            self.wandb.teardown()

    def _log_samples(self, event: Event) -> None:
        """Log the samples of an event as rows that are added to the table.

        W&B continues the table of a run that it resumes. Each part of an offline run begins a new one, and only the
        last is shown: so that has all samples of the run, which events.jsonl holds.
        """
        events = [event]
        if self.samples is None:
            self.samples = self.wandb.Table(columns=COLUMNS, log_mode="INCREMENTAL")
            if not self.run.resumed:
                earlier = [past for past in read_events(self.run_dir) if past["event"] == "samples"]
                events = [*[past for past in earlier if past != event], event]
        for past in events:
            for sample in past["samples"]:
                self.samples.add_data(past["step"], past["tokens"], sample["prompt"], sample["text"])
        row = {"step": event["step"], "tokens": event["tokens"], "samples": self.samples}
        self.run.log(row, step=event["step"] if self.offline else None)

    def _make_view(self) -> None:
        """Make the saved view, and say where it is."""
        try:
            url = within(
                SERVER, lambda: make_view(self.run_dir, self.run.entity, self.run.project, f"txl_dist: {self.run.name}")
            )
        except ImportError:
            log.info("W&B: for a saved view with the sections of the dashboard, pip install 'txl_dist[workspaces]'")
        except Exception as error:
            log.warning(f"W&B: no view was saved ({reason(error)})")
        else:
            if url:
                log.info(f"W&B: saved a view, {url}")

    @contextlib.contextmanager
    def _left_out_if_it_fails(self) -> Iterator[None]:
        """Leave W&B out from now on if it raises anything: its service may be killed, or its disk full."""
        try:
            yield
        except Exception as error:
            self.broken = True
            log.warning(f"W&B has broken down ({reason(error)}); training continues, and metrics.jsonl has everything")


def define_metrics(run: Any) -> None:
    """Define metrics as tracking/schema.py does: over tokens, with the best value of those that have one.

    A family is defined by what its keys begin with, because W&B's globs end with their only asterisk. The axes, all of
    which W&B can show metrics over, get no charts of their own.
    """
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    run.define_metric("*", step_metric="tokens")
    for panel in PANELS:
        if panel.better:
            for metric in panel.metrics:
                beginning, brace, _ = metric.key.partition("{")
                key = f"{beginning}*" if brace else metric.key
                run.define_metric(key, step_metric="tokens", summary=f"{SUMMARIES[panel.better]},last")


def summarize(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last value of each metric, and the best one of those that have one, of all starts of a run.

    W&B's own summary knows of the current start only.
    """
    summary: dict[str, Any] = {}
    for line in lines:
        summary |= line
    for panel in PANELS:
        if panel.better:
            best = min if panel.better == "lower" else max
            for key in [key for key in summary if any(metric.match(key) is not None for metric in panel.metrics)]:
                values = [line[key] for line in lines if key in line and isfinite(line[key])]
                extreme = {SUMMARIES[panel.better]: best(values)} if values else {}
                summary[key] = extreme | {"last": summary[key]}
    return summary


@contextlib.contextmanager
def noted(consequence: str) -> Iterator[None]:
    """Say in one line what did not work, if W&B raises anything."""
    try:
        yield
    except Exception as error:
        log.warning(f"W&B: {consequence} ({reason(error)})")
