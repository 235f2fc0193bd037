"""The W&B run of a run directory."""

import contextlib
import io
import logging
import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from txl_dist.config.schema import TrackingConfig
from txl_dist.distributed.preemption import REQUEUE
from txl_dist.errors import describe_os_error, first_line
from txl_dist.tracking.events import Event
from txl_dist.tracking.wandb_id import MAX_LENGTH, claim_run_id

log = logging.getLogger(__name__)

PROJECT = "txl_dist"

# W&B's settings, unless the environment sets them. What cannot be sent at the end of a run waits in its folder for
# `wandb sync`; older releases ignore the time limits.
DEFAULTS = {"WANDB_SILENT": "true", "WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "300"}

# Values of WANDB_MODE.
ONLINE = ("online", "run", "shared")
OFFLINE = ("offline", "dryrun")

# The most characters that W&B's server accepts; its client checks some of these limits only.
LONGEST = {"WANDB_NAME": MAX_LENGTH, "WANDB_RUN_GROUP": MAX_LENGTH, "WANDB_RUN_ID": MAX_LENGTH, "WANDB_JOB_TYPE": 64}


class WandbRun:
    """Logs to W&B under one ID, kept in RUN_DIR/wandb_id, so that a run that resumes stays one run in W&B.

    Metrics are shown over tokens. W&B never stops training: if it cannot be reached the run is kept offline, and if it
    cannot be started or breaks it is left out. A warning says so, and metrics.jsonl has what W&B lacks.

    Attributes:
        broken: whether W&B is left out.
        offline: whether metrics stay in RUN_DIR/wandb until `wandb sync` sends them.
    """

    def __init__(self, run_dir: str, config: dict[str, Any], tracking: TrackingConfig):
        self.broken = False
        self.offline = False
        try:
            self.start(run_dir, config, tracking)
        except Exception as error:  # W&B's own, the operating system's, or any other of a package that is broken
            self.broken = True
            log.warning(f"W&B is left out ({reason(error)}); training continues, and metrics.jsonl has everything")

    def start(self, run_dir: str, config: dict[str, Any], tracking: TrackingConfig) -> None:
        """Start W&B's run, offline if the server cannot be reached; raise whatever W&B raises."""
        import wandb  # only rank zero of a run that is not disabled needs it

        self.wandb = wandb
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
            "project": tracking.project or settings.project or PROJECT,
            "name": tracking.name or settings.run_name or Path(run_dir).resolve().name[:MAX_LENGTH],
            "id": claim_run_id(run_dir, settings.run_id),
            "dir": run_dir,
            "resume": "allow",
        }
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
        # Steps are logged as values: W&B would drop those below its own count when an offline run is continued.
        self.run.define_metric("tokens", hidden=True)
        self.run.define_metric("*", step_metric="tokens")

    def log(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step.

        Each part of an offline run would count W&B's own steps from 0. So they are given, and parts that are synced one
        after the other do not overlap.
        """
        if not self.broken:
            with self._left_out_if_it_fails():
                self.run.log(metrics, step=metrics["step"] if self.offline else None)

    def record(self, event: Event) -> None:
        """Show an event."""

    def finish(self, summary: dict[str, Any], preempted: bool) -> None:
        """Write the summary and end W&B's run, as preempted or as finished."""
        if not self.broken:
            with self._left_out_if_it_fails():
                self.run.summary.update(summary)
                if preempted:  # together with an exit code W&B shows it as preempted, not as finished
                    self.run.mark_preempting()
                self.run.finish(exit_code=REQUEUE if preempted else None)
        with contextlib.suppress(Exception, SystemExit):  # of a broken service; the next run starts another
            self.wandb.teardown()

    @contextlib.contextmanager
    def _left_out_if_it_fails(self) -> Iterator[None]:
        """Leave W&B out from now on if it raises anything: its service may be killed, or its disk full."""
        try:
            yield
        except Exception as error:
            self.broken = True
            log.warning(f"W&B has broken down ({reason(error)}); training continues, and metrics.jsonl has everything")


def default_mode(settings: Any) -> str:
    """Return the mode of W&B's settings; if they do not set it, online with a key to log in with, else offline."""
    if os.environ.get("WANDB_MODE") or settings.mode not in ONLINE:
        return settings.mode
    return "online" if has_key(settings) else "offline"


def has_key(settings: Any) -> bool:
    """Return whether there is a key for W&B's server, in the environment or in .netrc as `wandb login` writes it."""
    if settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == type(settings)().base_url:
        hosts.append("api.wandb.ai")  # the former address of the public server, for which old keys are valid
    given = os.environ.get("NETRC")
    paths = map(os.path.expanduser, [given] if given else ["~/.netrc", "~/_netrc"])
    try:
        keys = netrc.netrc(next(filter(os.path.exists, paths), os.devnull))
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return any(map(keys.authenticators, hosts))


def ignored_variables(options: dict[str, Any]) -> Iterator[str]:
    """Describe the environment variables for which the config or the run directory has another value."""
    sources = {
        "WANDB_MODE": ("mode", "tracking.mode"),
        "WANDB_PROJECT": ("project", "tracking.project"),
        "WANDB_NAME": ("name", "tracking.name"),
        "WANDB_RUN_ID": ("id", "RUN_DIR/wandb_id"),
        "WANDB_DIR": ("dir", "run.dir"),
        "WANDB_RESUME": ("resume", "txl_dist"),
    }
    for name, (option, source) in sources.items():
        if os.environ.get(name) not in (None, "", options[option]):
            yield f"{name} ({source} has {options[option]})"


def refused_settings(tracking: TrackingConfig) -> Iterator[str]:
    """Describe which environment variables and tracking.* keys W&B refuses, by its own rules."""
    given = [(name, name, value) for name, value in sorted(os.environ.items()) if name.startswith("WANDB_")]
    given += [("tracking.project", "WANDB_PROJECT", tracking.project)] if tracking.project is not None else []
    given += [("tracking.name", "WANDB_NAME", tracking.name)] if tracking.name is not None else []
    if not given:
        return
    try:
        import wandb

        settings = wandb.Settings(resume="allow")
    except Exception:  # a broken package, which is left out when the run starts
        return
    for key, variable, value in given:
        try:
            settings.model_copy().update_from_env_vars({variable: value})
        except (ValueError, TypeError, wandb.errors.Error) as error:
            yield f"{key}: W&B refuses it ({reason(error)})"
        if len(value) > LONGEST.get(variable, len(value)):
            yield f"{key}: has {len(value)} characters, and W&B accepts {LONGEST[variable]} at most"


def reason(error: Exception) -> str:
    """Return why W&B fails, in one line without the values of settings, which may be secret."""
    if isinstance(error, ValidationError):
        return "; ".join(detail["msg"].removeprefix("Value error, ") for detail in error.errors(include_input=False))
    return describe_os_error(error) if isinstance(error, OSError) else first_line(error)
