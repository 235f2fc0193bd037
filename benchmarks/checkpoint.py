"""What a checkpoint costs: python benchmarks/checkpoint.py

How long training waits for one, beside how long it takes until it is whole; how fast training is meanwhile; and
how long a start takes at step 10 and at step 1,000,000, with a line of metrics for every step.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from txl_dist.checkpoint.format import directory, latest, write_manifest
from txl_dist.cli import CONF, keep_freed_memory
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import TrainJob
from txl_dist.data.segments import Segment
from txl_dist.distributed.process_group import exit_process, process_group
from txl_dist.engine.zero import ZeroEngine
from txl_dist.objectives.causal_lm import CausalLM

TURNS = 5
FAR = 1_000_000
SIZES = {
    "quickstart": ["+experiment=quickstart"],
    "12 x 768": ["model.n_layer=12", "model.d_model=768", "model.n_head=12", "model.d_head=64", "model.d_inner=3456"],
}


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def waits(overrides: list[str], data: str, run_dir: str) -> dict[str, float]:
    """Seconds: of a save as training sees it, until it is whole, of a step, of a step while a checkpoint is written."""
    given = [f"run.dir={run_dir}", f"data.dir={data}", "data.num_lanes=4", "model.tgt_len=64", "model.mem_len=64"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*overrides, *given, "data.reset_memory=never"])
    job = parse_config(TrainJob, OmegaConf.to_container(config, resolve=True))
    engine = ZeroEngine(job, CausalLM(), 257, process_group(), None)
    tokens = np.random.default_rng(0).integers(257, size=(4, 64))

    def step() -> None:
        engine.train_step(Segment(engine.step, tokens, tokens, np.full_like(tokens, 10**6)))

    times_of: dict[str, list[float]] = {"wait": [], "whole": [], "step": [], "step_meanwhile": []}
    with engine.checkpointer:
        step()
        for _ in range(TURNS):
            times_of["step"].append(seconds(step))
            began = time.perf_counter()
            times_of["wait"].append(seconds(lambda: engine.save({}, None)))
            while engine.checkpointer.pending and not engine.checkpointer.pending.done():
                times_of["step_meanwhile"].append(seconds(step))
            engine.checkpointer.wait()
            times_of["whole"].append(time.perf_counter() - began)
    size = sum(file["bytes"] for file in latest(run_dir).files.values())
    return {"parameters": engine.num_parameters, "bytes": size} | {
        name: median(times) for name, times in times_of.items()
    }


def start(data: str, run_dir: str, step: int) -> float:
    """Seconds of the command that does one step more; the run is as if it had done `step` steps."""
    given = [f"run.dir={run_dir}", f"data.dir={data}", *SIZES["quickstart"], "data.reset_memory=never"]
    given += [f"train.max_steps={2 * FAR}", "train.eval_every=100000000", "tracking.mode=disabled"]
    command = [sys.executable, "-m", "txl_dist.train", *given]
    subprocess.run([*command, "train.stop_at=1"], check=True, capture_output=True)
    made = latest(run_dir)
    assert made
    manifest = json.loads((made.path / "checkpoint.json").read_text())
    manifest["state"] |= {"step": step, "tokens": step * manifest["state"]["tokens"]}
    del manifest["sha256"]
    write_manifest(made.path, manifest)
    made.path.rename(directory(run_dir, step))
    metrics = Path(run_dir, "metrics.jsonl")
    line = json.loads(metrics.read_text().splitlines()[0])
    with metrics.open("w") as file:
        file.writelines(json.dumps(line | {"step": number}) + "\n" for number in range(1, step + 1))
    return median(first_step(command, step) for _ in range(3))


def first_step(command: list[str], step: int) -> float:
    """Until the command has logged its first step; then it is ended."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [*command, "tracking.log_every=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        began = time.perf_counter()
        next(line for line in process.stdout if line.startswith("step "))
        took = time.perf_counter() - began
        process.kill()
    return took


def main() -> None:
    keep_freed_memory()
    console = Console(highlight=False)
    rows = {}
    starts = {}
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        prepare = [sys.executable, "-m", "txl_dist.prepare", "corpus=stdlib", "tokenizer=bytes", f"data.dir={data}"]
        subprocess.run(prepare, check=True, capture_output=True)
        for step in (10, FAR):
            starts[step] = start(data, f"{folder}/{step}", step)
        for name, overrides in SIZES.items():
            rows[name] = waits(overrides, data, f"{folder}/{name}")
            shutil.rmtree(f"{folder}/{name}")
    heads = "training waits, s", "until whole, s", "a step, s", "a step meanwhile, s"
    table = Table("", "parameters", "MB", *heads, box=None)
    for name, row in rows.items():
        columns = (f"{row[key]:.3f}" for key in ("wait", "whole", "step", "step_meanwhile"))
        table.add_row(name, f"{row['parameters']:,}", f"{row['bytes'] / 1e6:,.0f}", *columns)
    console.print(table)
    for step, took in starts.items():
        console.print(f"start at step {step:,}: {took:.1f} s until its first step is done")
    machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    machine |= {"torch": torch.__version__}
    Path(__file__).with_suffix(".json").write_text(
        json.dumps(machine | {"saves": rows, "start_seconds": starts}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
    exit_process()
