"""The W&B run of a run directory."""

import contextlib
import netrc
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from txl_dist.config import TrackingConfig
from txl_dist.errors import first_line
from txl_dist.preemption import REQUEUE

ID_FILE = "wandb_id"


class WandbRun:
    """Logs to W&B under one id, kept in RUN_DIR/wandb_id, so that a run that goes on is one run there too.

    Metrics are shown over tokens. A W&B that cannot be reached never stops training: the run is kept offline. Neither
    does one that breaks: it is told by `say`, and metrics.jsonl has what W&B lacks.
    """

    def __init__(self, run_dir: str, config: dict[str, Any], tracking: TrackingConfig, say: Callable[[str], None]):
        import wandb  # slow to import, it takes hold of standard output, and only the first rank needs it

        # What cannot be sent at the end of a run waits in its folder for `wandb sync`. Older releases know no limit.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")
        self.wandb, self.say, self.broken = wandb, say, False
        id_file = Path(run_dir) / ID_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n")
        mode = tracking.mode if tracking.mode != "auto" else os.environ.get("WANDB_MODE") or default_mode()
        options: dict[str, Any] = {
            "mode": mode,
            "project": tracking.project,
            "name": tracking.name or Path(run_dir).resolve().name,
            "id": id_file.read_text().strip(),
            "dir": run_dir,
            "config": config,
            "resume": "allow",
            "settings": wandb.Settings(silent=True, init_timeout=30),
        }
        try:
            self.run = wandb.init(**options)
        except wandb.errors.Error as error:
            if mode != "online":
                raise
            say(f"W&B cannot be reached ({first_line(error)}); this run is kept offline")
            wandb.teardown()
            self.run = wandb.init(**options | {"mode": "offline"})
        # Steps are values like others: W&B would drop those below its own count when an offline run goes on.
        self.run.define_metric("tokens", hidden=True)
        self.run.define_metric("*", step_metric="tokens")

    def log(self, metrics: dict[str, Any]) -> None:
        self._tell(lambda: self.run.log(metrics))

    def finish(self, summary: dict[str, Any], preempted: bool) -> None:
        self._tell(lambda: self.run.summary.update(summary))
        if preempted:
            self._tell(self.run.mark_preempting)  # with an exit code it is shown as preempted, not as finished
        self._tell(lambda: self.run.finish(exit_code=REQUEUE if preempted else None))
        with contextlib.suppress(Exception):  # of a broken one, so that a run after this one has another
            self.wandb.teardown()

    def _tell(self, tell: Callable[[], Any]) -> None:
        if self.broken:
            return
        try:
            tell()
        except Exception as error:  # whatever it is: W&B's service may have been killed, or its disk be full
            self.broken = True
            self.say(f"W&B has broken down ({first_line(error)}); training goes on, and metrics.jsonl has everything")


def default_mode() -> str:
    """online where there is a key to log in with, else offline."""
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        known = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        known = None
    return "online" if known else "offline"
