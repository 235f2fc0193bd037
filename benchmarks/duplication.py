"""Accuracy on sequences 0w0w by rounds of hashing (Kitaev et al. 2020, table 2): python benchmarks/duplication.py

A Reformer of one layer learns the second half of sequences of 256 tokens, by the commands that a user gives, and is
evaluated with other numbers of rounds than it was trained with: the share of the second halves that it finds
likeliest. Minutes on two CPU cores. The paper's sequences have 1,024 tokens, its model is twice as wide.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from txl_dist.data.segments import whole_split
from txl_dist.files.atomic import atomic_file
from txl_dist.objectives.causal_lm import CausalLM
from txl_dist.runs.load import load_model, open_data

LENGTH, SEQUENCES, STEPS = 256, 256, 600
EVALUATED = (8, 4, 2, 1)
PAPER = {4: (100, 99.9, 99.4, 91.9), 2: (100, 99.9, 98.1, 86.8), 1: (99.9, 99.6, 94.8, 77.9)}  # by trained rounds
DATA = [f"corpus.length={LENGTH}", "corpus.num_train=20000", "corpus.num_valid=64", f"corpus.num_test={SEQUENCES}"]
MODEL = {"n_layer": 1, "attn_layers": "[lsh]", "d_model": 128, "n_head": 4, "d_head": 32, "d_inner": 128}
MODEL |= {"lsh_chunk_len": 16, "n_buckets": 32, "tgt_len": LENGTH, "axial_shape": f"[{LENGTH}]"}
MODEL |= {"axial_widths": "[128]", "axial_init_std": 0.02, "dropout": 0.0, "dropatt": 0.0}
TRAINING = ["data.num_lanes=32", "data.reset_memory=document", "train.loss=second_half", "optimizer.lr=2e-3"]
TRAINING += ["schedule.warmup_steps=50", f"train.max_steps={STEPS}", f"train.eval_every={STEPS}", "tracking.to=[]"]


def run(command: str, *keys: str) -> None:
    subprocess.run([sys.executable, "-m", f"txl_dist.{command}", *keys], check=True, stdout=subprocess.DEVNULL)


@torch.no_grad()
def accuracy(run_dir: str, n_hashes: int) -> float:
    """Return the share of the second halves' tokens that are the likeliest."""
    model, checkpoint = load_model(run_dir, changes={"n_hashes": n_hashes})
    index = open_data(run_dir, checkpoint, "test")
    lanes = range(32)
    found = []
    for segment in whole_split(index, "test", len(lanes), LENGTH, "document", lanes):
        batch = CausalLM().batch(segment)
        targets = batch.pop("targets")
        log_probs, _ = model(batch, model.empty_memory(len(lanes)))
        found.append((log_probs.argmax(-1) == targets)[:, LENGTH // 2 :].double().mean())
    return float(torch.stack(found).mean())


def main() -> None:
    console = Console()
    results: dict[str, dict[str, float]] = {}
    table = Table("trained with", *(f"{rounds} rounds" for rounds in EVALUATED), "the paper's", title="accuracy, %")
    with tempfile.TemporaryDirectory() as folder:
        run("prepare", "corpus=duplication", *DATA, f"data.dir={folder}/data")
        shape = [f"model.{key}={value}" for key, value in MODEL.items()]
        for rounds in PAPER:
            run_dir = f"{folder}/{rounds}"
            keys = [*shape, *TRAINING, f"model.n_hashes={rounds}", f"data.dir={folder}/data", f"run.dir={run_dir}"]
            run("train", "model=reformer", *keys)
            shares = {str(evaluated): accuracy(run_dir, evaluated) for evaluated in EVALUATED}
            results[str(rounds)] = shares
            paper = " ".join(map(str, PAPER[rounds]))
            table.add_row(f"{rounds} rounds", *(f"{100 * share:.2f}" for share in shares.values()), paper)
            console.print(f"trained with {rounds} rounds: {shares}")
    console.print(table)
    with atomic_file(Path(__file__).with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
