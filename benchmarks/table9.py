"""Evaluation speed with memory against a vanilla sliding window (Dai et al. 2019, table 9): python benchmarks/table9.py

Both are ours, of the shape of enwik8 base, with weights drawn at random: the vanilla Transformer (absolute positions)
reads, for each token it predicts, a window of as many tokens as it may attend to; Transformer-XL reads segments of 128
and remembers as many, as keys and values. One lane, medians of several turns, both sides in turn.
"""

import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from txl_dist.cli import CONF
from txl_dist.evaluation.likelihood import losses_in_context
from txl_dist.models.transformer_xl import TransformerXL, TransformerXLConfig

PAPER = {800: 363, 1800: 773, 2800: 1409, 3800: 1874}  # how many times as fast, by the length of attention
SEGMENT = 128
VOCAB = 256
TURNS = 3


def model(**options: object) -> TransformerXL:
    defaults = OmegaConf.to_container(OmegaConf.load(CONF / "model/transformer_xl.yaml"))
    built = TransformerXL(TransformerXLConfig(**defaults | options), VOCAB).eval()
    return built.to("cuda" if torch.cuda.is_available() else "cpu")


def seconds(function: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def measure(length: int) -> dict[str, float]:
    """Seconds per token of both, with attention over `length` tokens."""
    torch.manual_seed(0)
    vanilla = model(attention="absolute", tgt_len=length, mem_len=0)
    with_memory = model(tgt_len=SEGMENT, mem_len=length)
    device = next(vanilla.parameters()).device
    stream = np.random.default_rng(0).integers(VOCAB, size=length + 1)
    position = np.array([length])
    tokens = torch.randint(VOCAB, (1, SEGMENT), device=device)
    lookback = torch.full((1, SEGMENT), 10 * length, device=device)
    memory = with_memory.empty_cache(1)
    times: dict[str, list[float]] = {"vanilla": [], "memory": []}
    for turn in range(TURNS + 1):
        window = seconds(lambda: losses_in_context(vanilla, stream, position, length, eos=0))
        segment = seconds(lambda: with_memory(tokens, tokens, lookback, memory)) / SEGMENT
        if turn:  # the first warms up
            times["vanilla"].append(window)
            times["memory"].append(segment)
    return {name: median(seconds_of) for name, seconds_of in times.items()}


def main() -> None:
    console = Console(highlight=False)
    rows = {}
    for length in track(PAPER, "measuring", console=Console(stderr=True), transient=True):
        measured = measure(length)
        rows[length] = measured | {"ratio": measured["vanilla"] / measured["memory"], "paper": PAPER[length]}
    table = Table("attention over", "vanilla, ms a token", "memory, ms a token", "ratio", "paper's ratio", box=None)
    for column in table.columns:
        column.justify = "right"
    for length, row in rows.items():
        times = f"{1000 * row['vanilla']:,.1f}", f"{1000 * row['memory']:,.3f}"
        table.add_row(f"{length:,}", *times, f"{row['ratio']:,.0f}", f"{row['paper']:,}")
    console.print(table)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    facts = {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit}
    Path(__file__).with_suffix(".json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
