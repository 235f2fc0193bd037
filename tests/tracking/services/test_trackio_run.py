"""Trackio's own files of real runs, read back, and what is said where it does not work."""

import json
import os
import sqlite3
from pathlib import Path

import pytest

from txl_dist.tracking.services.trackio_run import TrackioRun

REPO = Path(__file__).resolve().parents[3]
ONLY_TRACKIO = ["tracking.to=[trackio]"]


@pytest.fixture
def train(run, small, trackio):
    """Train in an interpreter that has Trackio."""

    def train(run_dir, *overrides, **options):
        path = os.pathsep.join([str(trackio), str(REPO)])
        overrides = [*small, f"run.dir={run_dir}", *overrides]
        return run("txl_dist.train", *overrides, PYTHONPATH=path, HF_HUB_OFFLINE="1", fresh=True, **options)

    return train


def rows(run_dir, table, columns):
    with sqlite3.connect(next(Path(run_dir).glob("trackio/*.db"))) as database:
        return database.execute(f"select {columns} from {table} order by id").fetchall()


@pytest.mark.slow
def test_trackio_has_what_metrics_jsonl_has(train, metrics, tmp_path):
    run_dir = tmp_path / "run"
    done = train(run_dir, "tracking.to=[wandb,trackio]", "tracking.mode=offline", "train.stop_at=10")
    assert "Trackio" not in done.stdout + done.stderr and "Created new run" not in done.stdout
    train(run_dir, *ONLY_TRACKIO)
    logged = rows(run_dir, "metrics", "run_id, run_name, step, metrics")
    assert len({run_id for run_id, *_ in logged}) == 1 and {name for _, name, *_ in logged} == {"run"}
    shown = [(step, json.loads(values)) for *_, step, values in logged]
    lines = metrics(run_dir)
    assert [step for step, _ in shown] == [line["step"] for line in lines]
    for (_, values), line in zip(shown, lines, strict=True):
        assert values == {key: value for key, value in line.items() if key not in ("step", "time")}
    alerts = rows(run_dir, "alerts", "title, text, level")
    assert alerts == [("Training has ended", "step 10", "info"), ("Training has ended", "step 20", "info")]
    assert json.loads(rows(run_dir, "configs", "config")[-1][0])["model"]["d_model"] == 32
    assert len(list(run_dir.glob("wandb/offline-run-*"))) == 1


@pytest.mark.slow
def test_samples_are_tables_and_a_failure_is_one_line(trackio, run, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(trackio), str(REPO)])
    done = run(script, str(tmp_path / "run"), PYTHONPATH=path, HF_HUB_OFFLINE="1", fresh=True)
    assert done.stdout.splitlines()[:2] == ["left out", "done"]  # and what Trackio says when Python ends
    assert done.stderr.count("Trackio is left out (") == 1 and "is not allowed" in done.stderr
    (values,) = [json.loads(values) for (values,) in rows(tmp_path / "run", "metrics", "metrics")]
    assert values["tokens"] == 128
    assert values["samples"]["_value"] == [{"prompt": "It was", "text": " a night"}]


SCRIPT = """
import sys
from txl_dist.config.schema import TrackingConfig
from txl_dist.tracking.events import make_event
from txl_dist.tracking.services.trackio_run import TrackioRun

tracking = TrackingConfig("disabled", 1, None, None, ["trackio"])
run = TrackioRun(sys.argv[1], {}, tracking)
run.record(make_event("samples", 1, 128, samples=[{"prompt": "It was", "text": " a night"}]))
run.finish("ended")
broken = TrackioRun(sys.argv[1], {}, TrackingConfig("disabled", 1, "registry-x", None, ["trackio"]))
print("left out" if broken.broken else "started")
broken.log({"step": 1, "tokens": 128})
broken.record(make_event("end", 1, 128, reason="ended", detail=""))
broken.finish("ended")
print("done")
"""


def test_a_package_that_is_missing_is_said_before_anything_starts(run, small, tmp_path):
    run_dir = tmp_path / "run"
    done = run("txl_dist.train", *small, f"run.dir={run_dir}", "tracking.to=[wandb,trackio]", expect=2)
    problem = "tracking.to=['wandb', 'trackio']: trackio is not installed; pip install 'txl_dist[trackio]'"
    assert problem in done.stderr and "Traceback" not in done.stderr
    assert not run_dir.exists()


def test_a_package_that_is_broken_is_left_out(tmp_path, monkeypatch, caplog):
    (tmp_path / "trackio.py").write_text("raise RuntimeError('no such thing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "files"))
    run = TrackioRun(str(tmp_path), {}, None)
    run.log({"step": 1, "tokens": 128})
    run.finish("ended")
    assert [record.getMessage() for record in caplog.records] == [
        "Trackio is left out (no such thing); training continues, and metrics.jsonl has everything"
    ]


@pytest.mark.slow
def test_without_a_tracker_nothing_is_started(run, small, tmp_path):
    """Neither for an empty list nor for mode=disabled is W&B imported."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/__init__.py").write_text("print('imported')\nraise RuntimeError('broken')\n")
    for name, keys in {"none": ["tracking.to=[]", "tracking.mode=offline"], "disabled": []}.items():
        overrides = [*small, f"run.dir={tmp_path}/{name}", *keys, "train.stop_at=2"]
        done = run("txl_dist.train", *overrides, PYTHONPATH=f"{tmp_path}{os.pathsep}{REPO}", WANDB_TAGS="one,,two")
        assert "imported" not in done.stdout
        assert not [path for path in (tmp_path / name).iterdir() if path.name.startswith(("wandb", "trackio"))]
