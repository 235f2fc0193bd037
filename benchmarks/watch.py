"""What tracking.watch_every=100 costs: python benchmarks/watch.py

The quickstart's model trains in one process; every other step is watched, and the medians of both kinds are compared.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from txl_dist.cli import CONF, keep_freed_memory
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import TrainJob
from txl_dist.data.segments import Segment
from txl_dist.distributed.process_group import exit_process, process_group
from txl_dist.engine.engine import Engine
from txl_dist.engine.zero import ZeroEngine
from txl_dist.objectives.causal_lm import CausalLM

WARM_UP, PAIRS = 5, 40
EVERY = 100
VOCABULARY = 2048


def quickstart(folder: str) -> Engine:
    data = f"data.dir={folder}/data"  # for the checks of the config; what is read is drawn
    prepare = [sys.executable, "-m", "txl_dist.prepare", "corpus=stdlib", "tokenizer=bytes", data]
    subprocess.run(prepare, check=True, capture_output=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["+experiment=quickstart", data, f"run.dir={folder}/run"])
    job = parse_config(TrainJob, OmegaConf.to_container(config, resolve=True))
    return ZeroEngine(job, CausalLM(), VOCABULARY, process_group(), None)


def step_seconds(engine: Engine, tokens: np.ndarray, is_watched: bool) -> float:
    engine.watch.every = 1 if is_watched else None
    began = time.perf_counter()
    engine.train_step(Segment(engine.step, tokens, tokens, np.full_like(tokens, 10**6)))
    return time.perf_counter() - began


def main() -> None:
    keep_freed_memory()
    times: dict[str, list[float]] = {"step": [], "watched_step": [], "watching": []}
    with tempfile.TemporaryDirectory() as folder:
        engine = quickstart(folder)
        tokens = np.random.default_rng(0).integers(VOCABULARY, size=(len(engine.lanes), engine.job.model.tgt_len))
        for _ in range(WARM_UP):
            step_seconds(engine, tokens, is_watched=True)
        for _ in range(PAIRS):
            times["step"].append(step_seconds(engine, tokens, is_watched=False))
            times["watched_step"].append(step_seconds(engine, tokens, is_watched=True))
            times["watching"].append(engine.watch.metrics["watch/seconds"])
    step, watched_step, watching = (median(seconds) for seconds in times.values())
    print(f"{engine.num_parameters:,} parameters, {torch.get_num_threads()} threads, medians of {PAIRS} steps")
    print(f"a step {step:.4f} s, a watched step {watched_step:.4f} s; it measures {watching:.4f} s of watching")
    ratio = 1 + (watched_step / step - 1) / EVERY
    print(f"watched at every {EVERY}th step, training takes {ratio:.4f} times as long")
    facts = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    facts |= {"torch": torch.__version__, "seconds": times, "ratio": ratio}
    Path(__file__).with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
    exit_process()
