"""W&B runs without training, and the package of Trackio."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.separate_packages import install
from txl_dist.config.schema import TrackingConfig
from txl_dist.tracking.events import EventsFile, make_event
from txl_dist.tracking.metrics import MetricsFile
from txl_dist.tracking.services.wandb_run import WandbRun


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """An environment without W&B's variables, its files or a key."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def start(caplog):
    """Start a run that logs some steps and events; return its warnings and the settings of W&B's run.

    A step is logged with its loss, 1 / step by default; an event is its kind, step and facts.
    """

    def start(run_dir, steps=(1,), end="ended", losses=None, events=(), **options):
        run_dir.mkdir(exist_ok=True)
        caplog.clear()
        run = WandbRun(str(run_dir), {}, TrackingConfig(**{"mode": "offline", "log_every": 1, **NO_NAMES, **options}))
        facts = None if run.broken else run.run.settings.model_copy()
        metrics = MetricsFile(str(run_dir), min(steps, default=0) - 1)
        file = EventsFile(str(run_dir))
        file.append(make_event("start", min(steps, default=0) - 1, 0))
        for step in steps:
            line = {"step": step, "tokens": 128 * step, "train/loss": (losses or {}).get(step, 1 / step)}
            metrics.append(line)
            run.log(line)
            for kind, when, what in events:
                if when == step:
                    event = make_event(kind, step, 128 * step, **what)
                    file.append(event)
                    run.record(event)
        run.record(make_event("end", max(steps, default=0), 0, reason=end, detail=""))
        run.finish(end)
        said = [record.getMessage() for record in caplog.records if record.name.startswith("txl_dist.")]
        return said, facts

    return start


NO_NAMES = {"project": None, "name": None}


@pytest.fixture(scope="session")
def trackio(request):
    """The folder in which Trackio is installed."""
    try:
        return install(request.config, Path(__file__).with_name("trackio.txt"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"Trackio cannot be installed here: {error}")
