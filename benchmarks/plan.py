"""What txl-plan predicts, held against real runs on a CPU: python benchmarks/plan.py memory|traffic|time

    memory      the most that each process has in memory within a step, beyond what it had before it built the model
    traffic     bytes through the loopback interface of a network namespace in which nothing else runs, per step
    time        a step of four models, predicted from what a fifth has measured

Each run is made by real processes that train as txl_dist.train does, on drawn tokens. A row is printed and added to
plan.json, in $OUT or the working directory, as soon as it is measured.
"""

import gc
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from txl_dist.cli import CONF, keep_freed_memory
from txl_dist.config.schema import PlanJob
from txl_dist.data.segments import Segment
from txl_dist.distributed.process_group import exit_process, process_group
from txl_dist.engine.pipeline import PipelineEngine
from txl_dist.engine.zero import ZeroEngine
from txl_dist.objectives.causal_lm import CausalLM
from txl_dist.planning.dataset import Dataset
from txl_dist.planning.planner import Plan, Planner, example

ROWS = Path(os.environ.get("OUT", "."), "plan.json")
VOCAB_SIZE = 20_000
MIDDLE = ["model.n_layer=6", "model.d_model=256", "model.n_head=4", "model.d_inner=1024", "model.tgt_len=128"]
MIDDLE += ["model.mem_len=128", "data.num_lanes=16", "model.dropout=0.0"]
SMALL = ["model.n_layer=2", "model.d_model=16", "model.d_inner=16", "model.tgt_len=8", "model.mem_len=8"]
SPLITS = {
    "ZeRO 0": ["engine.zero_stage=0"],
    "ZeRO 1": ["engine.zero_stage=1"],
    "ZeRO 2": ["engine.zero_stage=2"],
    "ZeRO 3": ["engine.zero_stage=3"],
    "2 stages, ZeRO 0": ["engine.zero_stage=0", "engine.pipeline_stages=2", "engine.gradient_accumulation=4"],
    "2 stages, ZeRO 1": ["engine.zero_stage=1", "engine.pipeline_stages=2", "engine.gradient_accumulation=4"],
    "ZeRO 1, 4 micro-batches": ["engine.zero_stage=1", "engine.gradient_accumulation=4"],
}
CHECKPOINTING = {"off": [], "on": ["engine.activation_checkpointing=true"]}

# Large tensors go back to the operating system as soon as they are freed: a process has what its tensors have.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TURNS = 3
MODELS = {
    "6 x 256": MIDDLE,
    "12 x 256": [*MIDDLE, "model.n_layer=12"],
    "4 x 512, 8 lanes": [*MIDDLE, "model.n_layer=4", "model.d_model=512", "model.d_inner=2048", "data.num_lanes=8"],
    "4 x 256, memory of 512": [*MIDDLE, "model.n_layer=4", "model.mem_len=512", "data.num_lanes=8"],
    "6 x 256, clusters": [*MIDDLE, "model.cutoffs=[2000,10000]", "model.div_val=2", "model.tie_projections=true"],
}

Row = dict[str, Any]


def plan_job(*overrides: str) -> PlanJob:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return TypeAdapter(PlanJob).validate_python(
            OmegaConf.to_container(
                compose("plan", ["device=cpu", f"vocab_size={VOCAB_SIZE}", *overrides]), resolve=True
            )
        )


def predicted(*overrides: str) -> Plan:
    job = plan_job(*overrides)
    return Planner(job, Dataset(VOCAB_SIZE, None, "given")).plan(job)


# ----------------------------------------------------------------------------------------------- one of the ranks


def train(overrides: list[str], steps: int) -> None:
    """Train a few steps as one rank of several, and print what this rank measures."""
    if not RETURN_MEMORY.keys() <= os.environ.keys():
        keep_freed_memory()  # as the commands do
    job = plan_job(*overrides)
    group = process_group()
    warm_up(overrides, group)
    before_model = status("VmRSS")
    built = build(job, group)
    segment = drawn_segment(job, built)
    seconds = []
    traffic = []
    for step in range(1, steps + 1):
        if step == 2:  # all buffers are there, and the first step's are gone
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        torch.distributed.barrier()
        sent = loopback_bytes()
        torch.distributed.barrier()
        began = time.process_time()
        built.train_step(Segment(step - 1, *segment))
        seconds.append(time.process_time() - began)
        torch.distributed.barrier()
        traffic.append(loopback_bytes() - sent)
    row = {"rank": group.rank, "peak": status("VmHWM") - before_model}
    row |= {"seconds": median(seconds[1:]), "traffic": median(traffic[1:])}
    for rank in range(group.size):
        torch.distributed.barrier()
        if rank == group.rank:
            print(json.dumps(row), flush=True)
    torch.distributed.barrier()
    exit_process()


def build(job: PlanJob, group: Any) -> Any:
    kind = PipelineEngine if job.engine.pipeline_stages > 1 else ZeroEngine
    return kind(job, CausalLM(), VOCAB_SIZE, group, None)


def warm_up(overrides: list[str], group: Any) -> None:
    """Train a small model first, so that the libraries have loaded what they load to train."""
    small = plan_job(*overrides, *SMALL)
    built = build(small, group)
    built.train_step(Segment(0, *drawn_segment(small, built)))
    built.close()
    del built
    gc.collect()


def drawn_segment(job: PlanJob, built: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch = example(job, built.objective, max(1, len(built.lanes)), VOCAB_SIZE)
    return tuple(batch[name][: len(built.lanes)].numpy() for name in ("inputs", "targets", "lookback"))


def status(key: str) -> int:
    """Return a figure of this process in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def loopback_bytes() -> int:
    """Return the bytes that the loopback interface has sent."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.split()[0] == "lo:")


def measured(
    overrides: list[str], processes: int, steps: int = 4, own_network: bool = False, **environment: str
) -> list[Row]:
    """Return what each rank of a run has measured.

    Args:
        own_network: in a network of its own, with nothing but its loopback interface.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command += [__file__, "rank", str(steps), *overrides]
    if own_network:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    assert done.returncode == 0 and len(rows) == processes, done.stdout + done.stderr
    return rows


# ------------------------------------------------------------------------------------------------- the three tables


def memory(*only: str) -> None:
    """The peaks of two processes, by ZeRO stage or pipeline stage, with and without checkpointing."""
    for split, keys in SPLITS.items():
        if only and split not in only:
            continue
        for checkpointing, more in CHECKPOINTING.items():
            overrides = ["gpus=2", *MIDDLE, *keys, *more]
            plan = predicted(*overrides)
            for row in measured(overrides, 2, **RETURN_MEMORY):
                stage = plan.split.stage(row["rank"])
                figures = {"predicted": plan.memory[stage].total, "measured": row["peak"]}
                record("memory", f"{split}, recompute {checkpointing}, rank {row['rank']}", figures, 0.1)


def traffic(*only: str) -> None:
    """The bytes that two processes send in a step, together."""
    for split, keys in SPLITS.items():
        if only and split not in only:
            continue
        overrides = ["gpus=2", *MIDDLE, *keys]
        plan = predicted(*overrides)
        ranks = range(plan.split.ranks)
        sent = sum(sum(plan.sent[plan.split.stage(rank)].values()) for rank in ranks)
        row = measured(overrides, 2, own_network=True)[0]
        record("traffic", split, {"predicted": sent, "measured": row["traffic"]}, 0.05)


def step_time() -> None:
    """The CPU seconds of a step of one process with one thread, which other work on the machine does not lengthen."""
    times: dict[str, list[float]] = {name: [] for name in MODELS}
    for _ in range(TURNS):
        for name, keys in MODELS.items():
            times[name].append(measured([*keys, "engine.zero_stage=0"], 1)[0]["seconds"])
    plans = {name: predicted(*keys, "engine.zero_stage=0").time.total for name, keys in MODELS.items()}
    fifth, *others = MODELS
    slowdown = median(times[fifth]) / plans[fifth]
    print(f"{fifth}: {median(times[fifth]):.4g} s, {slowdown:.3g} times as long as assumed")
    for name in others:
        record("time", name, {"predicted": plans[name] * slowdown, "measured": median(times[name])}, 0.2)


def record(table: str, name: str, figures: dict[str, float], limit: float) -> None:
    """Print a row, and add it to the file."""
    error = figures["predicted"] / figures["measured"] - 1
    verdict = "" if abs(error) <= limit else f"  MORE THAN {limit:.0%}"
    print(f"{name:<45}{figures['predicted']:>16,.6g}{figures['measured']:>16,.6g}{error:>+9.1%}{verdict}", flush=True)
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    rows.setdefault(table, {})[name] = figures | {"error": error}
    ROWS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        train(sys.argv[3:], int(sys.argv[2]))
    else:
        print(f"{sys.argv[1]:<45}{'predicted':>16}{'measured':>16}{'error':>9}")
        {"memory": memory, "traffic": traffic, "time": step_time}[sys.argv[1]](*sys.argv[2:])
