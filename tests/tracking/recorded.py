"""Runs as training records them, written by hand."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]

TIME = 1_790_000_000.0
CONFIG = {"run": {"dir": "runs/x"}, "model": {"n_layer": 2, "mem_len": 64}, "train": {"max_steps": 400}}


def lines(count=40, loss=4.0, **more):
    """Lines of a run that logs every 10 steps and evaluates every 50."""
    for number in range(1, count + 1):
        step = 10 * number
        line = {
            "step": step,
            "tokens": 1000 * step,
            "train/loss": loss - number / count,
            "train/lr": loss * 1e-3 / number,
        }
        line |= {"train/step_loss": loss - number / count + 0.1 * (-1) ** number, "train/tokens_per_second": 5000.0}
        if step % 50 == 0:
            line |= {"valid/loss": loss - number / count + 0.2, "valid/bits_per_byte": loss / number}
        yield line | more | {"time": TIME + step}


def heads():
    """Metrics of 2 layers x 3 heads, and of 2 distances."""
    found = {"memory/share": 0.5}
    for layer in range(2):
        for head in range(3):
            found[f"memory/share/layer.{layer}.head.{head}"] = 0.1 * (1 + layer * 3 + head)
            for distance in (0, 16):
                found[f"memory/distance/layer.{layer}.head.{head}.from.{distance}"] = 0.25 + distance / 64
    return found


def event(kind, step, time=None, **facts):
    return {"event": kind, "step": step, "tokens": 1000 * step, "time": TIME + step if time is None else time, **facts}


def start(step=0, time=None, origin="starting", config=CONFIG):
    return event("start", step, time, origin=origin, split="1 x cpu, ZeRO 1", host="node7", versions={}, config=config)


def write(run_dir, lines, events=()):
    """Write the files of a run, and return its directory."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    for name, records in (("metrics.jsonl", lines), ("events.jsonl", events)):
        (run_dir / name).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return run_dir


def write_usual(run_dir, loss=4.0, config=CONFIG):
    """Write a run with two starts, checkpoints, a bad step and samples."""
    samples = [{"prompt": "It was ", "text": "<b>a</b> dark night"}, {"prompt": "import ", "text": "os\nimport sys"}]
    events = [
        start(config=config),
        event("checkpoint", 100, path="x", valid_loss=3.5),
        event("samples", 100, samples=samples),
        event("bad_step", 150, why="the loss is nan", action="skip"),
        event("checkpoint", 200, path="x", valid_loss=None),
        event("end", 200, reason="preempted", detail="after step 200"),
        start(200, TIME + 200.5, "resuming from step 200", config | {"engine": {"zero_stage": 2}}),
        event("samples", 400, samples=samples),
        event("end", 400, reason="ended", detail=""),
    ]
    return write(run_dir, lines(loss=loss, **heads()), events)


@contextlib.contextmanager
def serving(pattern):
    """Serve the dashboard of the runs that a pattern matches, and yield its address; Ctrl-C ends it in order."""
    command = [sys.executable, "-m", "txl_dist.dashboard", f"run={pattern}", "serve=true", "port=0"]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    options = {"cwd": REPO, "env": environment, "stdout": subprocess.PIPE, "text": True, "preexec_fn": heed_ctrl_c}
    with subprocess.Popen(command, **options) as server:
        try:
            yield re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())[0]
        finally:
            server.send_signal(signal.SIGINT)
            try:
                assert server.wait(timeout=60) == 0
            finally:
                server.kill()


def heed_ctrl_c():
    """Have a process end at Ctrl-C, which a shell has those that it starts in the background ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
