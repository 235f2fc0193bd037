"""The W&B run of a run directory."""

import contextlib
import io
import logging
import netrc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from txl_dist.config.schema import TrackingConfig
from txl_dist.distributed.preemption import REQUEUE
from txl_dist.errors import describe_os_error, first_line
from txl_dist.tracking.wandb_id import MAX_LENGTH, claim_run_id

PROJECT = "txl_dist"

# W&B's settings where the environment has none. What cannot be sent at the end of a run waits in its folder for
# `wandb sync`; older releases know no limit.
DEFAULTS = {"WANDB_SILENT": "true", "WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "300"}

# Values of WANDB_MODE.
ONLINE = ("online", "run", "shared")
OFFLINE = ("offline", "dryrun")

# Characters that W&B's server accepts at most; its client knows of some limits only.
LONGEST = {"WANDB_NAME": MAX_LENGTH, "WANDB_RUN_GROUP": MAX_LENGTH, "WANDB_RUN_ID": MAX_LENGTH, "WANDB_JOB_TYPE": 64}


class WandbRun:
    """Logs to W&B under one id, kept in RUN_DIR/wandb_id, so that a run that goes on is one run there too.

    Metrics are shown over tokens. W&B never stops training: where it cannot be reached the run is kept offline, and
    where it cannot be started or breaks it is left out. `say` gets a line about it, and metrics.jsonl has what W&B
    lacks.
    """

    def __init__(self, run_dir: str, config: dict[str, Any], tracking: TrackingConfig, say: Callable[[str], None]):
        self.say, self.broken, self.offline = say, False, False
        try:
            self.start(run_dir, config, tracking)
        except Exception as error:  # W&B's own, the operating system's, or any other of a package that is broken
            self.broken = True
            say(f"W&B is left out ({reason(error)}); training goes on, and metrics.jsonl has everything")

    def start(self, run_dir: str, config: dict[str, Any], tracking: TrackingConfig) -> None:
        import wandb  # only the first rank of a run that is not disabled needs it

        self.wandb = wandb
        logging.raiseExceptions = False  # W&B's own log, on a full disk: a trace for each of its lines
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        with contextlib.redirect_stderr(io.StringIO()) as said:  # a trace, where a settings file is wrong
            settings = wandb.setup().settings  # of the environment and of W&B's files
        for line in said.getvalue().splitlines()[:1]:
            self.say(f"W&B: {line.removeprefix('wandb: ')}")
        mode = tracking.mode if tracking.mode != "auto" else default_mode(settings)
        options: dict[str, Any] = {
            "mode": mode,
            "project": tracking.project or settings.project or PROJECT,
            "name": tracking.name or settings.run_name or Path(run_dir).resolve().name[:MAX_LENGTH],
            "id": claim_run_id(run_dir, settings.run_id, self.say),
            "dir": run_dir,
            "resume": "allow",
        }
        if ignored := list(not_taken(options)):
            self.say(f"W&B: not taken from the environment: {'; '.join(ignored)}")
        try:
            self.run = wandb.init(**options, config=config)
        except Exception as error:
            if mode not in ONLINE:
                raise
            self.say(f"W&B cannot be reached ({reason(error)}); this run is kept offline")
            wandb.teardown()
            mode = "offline"
            self.run = wandb.init(**options | {"mode": mode}, config=config)
        self.offline = mode in OFFLINE
        # Steps are values like others: W&B would drop those below its own count when an offline run goes on.
        self.run.define_metric("tokens", hidden=True)
        self.run.define_metric("*", step_metric="tokens")

    def log(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step.

        Each part of an offline run counts W&B's own steps from 0. They are given there, so that parts that are synced
        one after the other do not overlap.
        """
        step = metrics["step"] if self.offline else None
        self._tell(lambda: self.run.log(metrics, step=step))

    def finish(self, summary: dict[str, Any], preempted: bool) -> None:
        self._tell(lambda: self.run.summary.update(summary))
        if preempted:  # with an exit code it is shown as preempted, not as finished
            self._tell(lambda: self.run.mark_preempting())
        self._tell(lambda: self.run.finish(exit_code=REQUEUE if preempted else None))
        with contextlib.suppress(Exception, SystemExit):  # of a broken one, so that a run after this one has another
            self.wandb.teardown()

    def _tell(self, tell: Callable[[], Any]) -> None:
        if self.broken:
            return
        try:
            tell()
        except Exception as error:  # whatever it is: W&B's service may have been killed, or its disk be full
            self.broken = True
            self.say(f"W&B has broken down ({reason(error)}); training goes on, and metrics.jsonl has everything")


def default_mode(settings: Any) -> str:
    """Return the mode of W&B's settings; where they leave it open, online with a key to log in with, else offline."""
    if os.environ.get("WANDB_MODE") or settings.mode not in ONLINE:
        return settings.mode
    return "online" if has_key(settings) else "offline"


def has_key(settings: Any) -> bool:
    """Return whether there is a key for W&B's server, in the environment or in .netrc as `wandb login` writes it."""
    if settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == type(settings)().base_url:
        hosts.append("api.wandb.ai")  # where the public server was before, and old keys are good for
    named = os.environ.get("NETRC")
    paths = map(os.path.expanduser, [named] if named else ["~/.netrc", "~/_netrc"])
    try:
        keys = netrc.netrc(next(filter(os.path.exists, paths), os.devnull))
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return any(map(keys.authenticators, hosts))


def not_taken(options: dict[str, Any]) -> Iterator[str]:
    """Describe the variables for which the config or the run directory has another value."""
    sources = {
        "WANDB_MODE": ("mode", "tracking.mode"),
        "WANDB_PROJECT": ("project", "tracking.project"),
        "WANDB_NAME": ("name", "tracking.name"),
        "WANDB_RUN_ID": ("id", "RUN_DIR/wandb_id"),
        "WANDB_DIR": ("dir", "run.dir"),
        "WANDB_RESUME": ("resume", "a run directory goes on"),
    }
    for name, (option, source) in sources.items():
        if os.environ.get(name) not in (None, "", options[option]):
            yield f"{name} ({source} has {options[option]})"


def refused_settings(tracking: TrackingConfig) -> Iterator[str]:
    """Describe what W&B does not accept of the environment and of tracking.*, by W&B's own rules."""
    given = [(name, name, value) for name, value in sorted(os.environ.items()) if name.startswith("WANDB_")]
    given += [("tracking.project", "WANDB_PROJECT", tracking.project)] if tracking.project is not None else []
    given += [("tracking.name", "WANDB_NAME", tracking.name)] if tracking.name is not None else []
    if not given:
        return
    try:
        import wandb

        settings = wandb.Settings(resume="allow")
    except Exception:  # a package that is broken, which is left out when the run starts
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
        return "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors(include_input=False))
    return describe_os_error(error) if isinstance(error, OSError) else first_line(error)
