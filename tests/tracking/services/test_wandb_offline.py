"""W&B's own offline files of real runs, read back."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tracking.services.wandb_files import read_starts, records
from txl_dist.checkpoint.format import latest
from txl_dist.distributed.preemption import REQUEUE

REPO = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slow


def test_offline_runs_hold_what_metrics_jsonl_holds(run, small, metrics, tmp_path):
    command = [*small, f"run.dir={tmp_path}", "tracking.mode=auto", "engine.peak_tflops=1"]
    run("txl_dist.train", *command, "train.stop_at=10", WANDB_API_KEY="", NETRC="/nowhere")
    run("txl_dist.train", *command, WANDB_API_KEY="", NETRC="/nowhere")
    first, second = read_starts(tmp_path)
    assert first["id"] == second["id"] == (tmp_path / "wandb_id").read_text().strip()
    assert '"d_model":32' in first["config"]["model"].replace(" ", "")
    lines = metrics(tmp_path)
    history = [*first["history"], *second["history"]]
    shown = {int(row["step"]): row for row in history}
    assert len(shown) == len(history) == 20
    for line in lines:  # two of the last step: one of training and valid, one of test
        for key, value in line.items():
            assert key == "time" or float(shown[line["step"]][key]) == value, key
    assert [int(row["_step"]) for row in history] == list(shown)  # parts that are synced in turn do not overlap
    assert "train/mfu" in history[0]
    loss = lines[-1]["test/loss"]
    assert json.loads(second["summary"]["test/loss"]) == {"min": loss, "last": loss}
    best = min(line["valid/loss"] for line in lines if "valid/loss" in line)
    assert json.loads(second["summary"]["valid/loss"])["min"] == best
    checkpoints = [[artifact for artifact in part["artifact"] if artifact.type == "model"] for part in (first, second)]
    assert [sorted(artifact.aliases) for artifact in checkpoints[0]] == [["best", "latest", "step-10"]]
    assert [sorted(artifact.aliases) for artifact in checkpoints[1]] == [["best", "latest", "step-20"]]
    fingerprint = json.loads(second["config"]["dataset"])["fingerprint"]
    assert fingerprint == latest(tmp_path).data["fingerprint"]
    assert [alert.title for part in (first, second) for alert in part["alert"]] == ["Training has ended"] * 2


def test_all_parts_together_have_every_step(run, small, metrics, tmp_path):
    """Of three offline starts, of which the second was killed: what it did after its last checkpoint was done again."""
    keys = ["train.max_steps=600", "train.eval_every=1000", "checkpoint.every=50", "tracking.mode=offline"]
    command = [*small, f"run.dir={tmp_path}", *keys]
    run("txl_dist.train", *command, "train.stop_at=30")
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([sys.executable, "-m", "txl_dist.train", *command], cwd=REPO, env=environment)
    while metrics(tmp_path)[-1]["step"] < 120:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    run("txl_dist.train", *command, "train.stop_at=600")
    parts = [[int(row["_step"]) for row in part["history"]] for part in read_starts(tmp_path)]
    resumed = parts[2][0]
    last = parts[1][-1]
    assert resumed % 50 == 1 and resumed > 50
    assert parts[0] == list(range(1, 31)) and parts[2] == list(range(resumed, 601))
    assert parts[1] == list(range(31, last + 1)) and last + 1 >= resumed
    shown = {int(row["step"]): row for part in read_starts(tmp_path) for row in part["history"]}
    for line in metrics(tmp_path):  # a later part replaces what an earlier one has of the same step
        if "train/loss" in line:
            assert float(shown[line["step"]]["train/loss"]) == line["train/loss"]


def test_a_wandb_that_cannot_be_reached_does_not_stop_training(run, small, metrics, tmp_path):
    done = run(
        "txl_dist.train",
        *small,
        f"run.dir={tmp_path}",
        "tracking.mode=online",
        WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",
    )
    assert "kept offline" in done.stdout
    assert len([line for line in metrics(tmp_path) if "train/loss" in line]) == 20
    shown = [int(row["step"]) for row in read_starts(tmp_path)[-1]["history"]]
    assert shown == sorted({line["step"] for line in metrics(tmp_path)})


def test_a_key_is_written_nowhere(run, small, tmp_path):
    """Neither in the run directory nor in what is printed, nor in what W&B keeps at home."""
    key, home = secrets.token_hex(20), tmp_path / "home"
    home.mkdir()
    overrides = [*small, f"run.dir={tmp_path}/run", "tracking.mode=auto", "train.max_steps=4"]
    done = run("txl_dist.train", *overrides, WANDB_API_KEY=key, WANDB_MODE="offline", HOME=str(home))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "checkpoint.json"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert key not in done.stdout + done.stderr
    assert [path for path in files if key.encode() in path.read_bytes()] == []


def test_a_url_with_a_secret_is_refused_before_anything_is_written(run, small, tmp_path):
    secret = secrets.token_hex(20)
    for url in (f"https://user:{secret}@host/data", f"https://host/data?token={secret}"):
        done = run("txl_dist.train", *small, f"data.dir='{url}'", f"run.dir={tmp_path}/run", cwd=tmp_path, expect=2)
        assert "data.dir=https://host/data: the URL" in done.stderr and "Traceback" not in done.stderr
        assert secret not in done.stdout + done.stderr
        assert list(tmp_path.iterdir()) == []


def test_training_continues_if_the_service_is_killed(small, metrics, tmp_path):
    keys = ["tracking.mode=offline", "train.max_steps=300", "train.eval_every=1000", "checkpoint.every=1000"]
    command = [sys.executable, "-m", "txl_dist.train", *small, f"run.dir={tmp_path}", *keys]
    with (tmp_path / "said").open("w") as said:
        training = subprocess.Popen(command, stdout=said, stderr=said)
    while not (tmp_path / "metrics.jsonl").is_file() or not (tmp_path / "metrics.jsonl").stat().st_size:
        assert training.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.05)
    (service,) = psutil.Process(training.pid).children()
    assert "wandb-core" in service.name()
    service.kill()
    assert training.wait(timeout=300) == 0, (tmp_path / "said").read_text()
    words = (tmp_path / "said").read_text()
    assert words.count("W&B has broken down") == 1 and "Traceback" not in words
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 301))
    assert "test/loss" in lines[-1]
    assert len(read_starts(tmp_path)[0]["history"]) < len(lines)  # it was killed while there was something to log


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_stopped_run_is_finished_well_and_resumes(small, metrics, tmp_path, number):
    """Signalled as Slurm does it: all processes, also W&B's, which SIGTERM ends with what it has not written yet."""
    command = [sys.executable, "-m", "txl_dist.train", *small, f"run.dir={tmp_path}", "tracking.mode=offline"]
    command += ["train.max_steps=3000", "train.eval_every=3000"]
    metrics_file = tmp_path / "metrics.jsonl"
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    start = subprocess.Popen(command, cwd=REPO, env=environment, stderr=subprocess.PIPE, text=True)
    while not (metrics_file.exists() and metrics_file.read_text().count("\n") >= 5):
        assert start.poll() is None
        time.sleep(0.01)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(start.pid)], capture_output=True, text=True).stdout
    assert children  # W&B's
    for process in (*map(int, children.split()), start.pid):
        os.kill(process, number)
    assert start.wait(600) == REQUEUE
    assert "Traceback" not in start.stderr.read()
    step = metrics(tmp_path)[-1]["step"]
    subprocess.run([*command, f"train.stop_at={step + 2}"], cwd=REPO, env=environment, check=True)

    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, step + 3))
    first, second = read_starts(tmp_path)
    assert [float(row["step"]) for row in second["history"]] == [step + 1, step + 2]
    if number == signal.SIGUSR1:
        assert first["id"] == second["id"]
        assert [float(row["step"]) for row in first["history"]] == list(range(1, step + 1))
        one, two = (list(records(path)) for path in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb")))
        assert [record.exit.exit_code for record in one if record.WhichOneof("record_type") == "exit"] == [REQUEUE]
        kinds = [[record.WhichOneof("record_type") for record in start] for start in (one, two)]
        assert [start.count("preempting") for start in kinds] == [1, 0]
