"""Kernels, training and inference on one GPU: python benchmarks/gpu.py, ten minutes.

First each attention backend is held against float64: none may be off by more than twice what the plain formula
is in bfloat16. Then the paper's and NVIDIA's models train by the engine that `txl_dist.train` uses, with each backend,
on drawn tokens; then a model reads, beside transformers 4.36.2's of the same shape. Medians of several turns.
"""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from cpu import text
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from txl_dist.cli import CONF
from txl_dist.config.schema import TrainJob
from txl_dist.data.segments import Segment
from txl_dist.distributed.process_group import process_group
from txl_dist.engine.zero import ZeroEngine
from txl_dist.models.layers.backends import BACKENDS, AttentionWindow, RelativePositions, attend
from txl_dist.models.transformer_xl import TransformerXL
from txl_dist.objectives.causal_lm import CausalLM
from txl_dist.tracking.gpu_peak import total_peak_flops

TURNS = 5
STEPS = 4
DEVICE = torch.device("cuda")

# Lanes, vocabulary, and tokens per second to be reached: NVIDIA's of eight A100 (both wt103), and what we count on.
TRAINING = {
    "wt103_large": (64, 267735, 191_148),
    "wt103_base_nvidia": (128, 267735, 449_890),
    "enwik8_large": (32, 205, 160_000),
}
# Lanes and NVIDIA's tokens per second of wt103_base_nvidia on one A100 by TorchScript.
INFERENCE = {1: 6_936, 32: 107_082}
# Length, memory, n_head, d_head, and how far back queries look.
KERNELS = [(384, 384, 16, 64, 10**6), (192, 192, 8, 64, 10**6), (768, 768, 8, 128, 10**6), (64, 640, 8, 64, 639)]


def job(name: str, lanes: int, *options: str) -> TrainJob:
    overrides = [f"+experiment={name}", f"data.num_lanes={lanes}", *options]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return TypeAdapter(TrainJob).validate_python(OmegaConf.to_container(compose("train", overrides), resolve=True))


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------- kernels


def errors(
    backend: str, dtype: torch.dtype, length: int, mem_len: int, n_head: int, d_head: int, lookback: int
) -> list[float]:
    """The largest difference from float64 of the result and of the six gradients, as shares of the largest number."""
    torch.manual_seed(0)
    keys = mem_len + length
    lanes = 2
    shapes = [(lanes, length), (lanes, keys), (lanes, keys), (keys + 1,)]
    query, key, value, r = (torch.randn(*shape, n_head, d_head, device=DEVICE) for shape in shapes)
    u, v = (torch.randn(n_head, d_head, device=DEVICE) for _ in range(2))
    weight = torch.randn(query.shape, device=DEVICE)
    sees = torch.full((lanes, length), lookback, device=DEVICE)

    def results(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        # Rounded first, so that all compute from the same numbers.
        given = [x.bfloat16().to(dtype).requires_grad_() for x in (query, key, value, r, u, v)]
        q, k, val, position_keys, bias_u, bias_v = given
        positions = RelativePositions(q + bias_v, position_keys, None)
        out = attend(backend, q + bias_u, k, val, positions, AttentionWindow(sees, mem_len, dtype), None)
        return [out, *torch.autograd.grad(out, given, weight.bfloat16().to(dtype))]

    pairs = zip(results(backend, dtype), results("reference", torch.float64), strict=True)
    return [float((result.double() - right).abs().max() / right.abs().max()) for result, right in pairs]


def kernels() -> Table:
    names = ["result", "query", "key", "value", "r", "u", "v"]
    table = Table(
        "backend", "length + memory, heads", *names, box=None, title="off float64 (bfloat16), parts in a thousand"
    )
    for shape in KERNELS:
        plain = errors("reference", torch.bfloat16, *shape)
        for backend in BACKENDS:
            measured = errors(backend, torch.bfloat16, *shape)
            length, mem_len, n_head, d_head, _ = shape
            columns = [f"{1000 * error:.2f}" for error in measured]
            table.add_row(backend, f"{length} + {mem_len}, {n_head} x {d_head}", *columns)
            worse = [name for name, error, limit in zip(names, measured, plain, strict=True) if error > 2 * limit]
            assert not worse, f"{backend} is off by more than twice the formula in {', '.join(worse)} at {shape}"
    return table


# ------------------------------------------------------------------------------------------------------ training


def training(name: str, backend: str, compiled: bool) -> dict[str, float]:
    """Tokens per second, share of the peak, and peak memory in GiB."""
    lanes, vocab_size, _ = TRAINING[name]
    keys = ["optimizer=adam", "engine.zero_stage=1", "engine.precision=bf16"]
    given = job(name, lanes, *keys, f"engine.attention={backend}", f"engine.compile={str(compiled).lower()}")
    torch.cuda.reset_peak_memory_stats()
    engine = ZeroEngine(given, CausalLM(), vocab_size, process_group(), None)
    tokens = text(lanes, given.model.tgt_len, vocab_size).numpy()
    lookback = np.full_like(tokens, 10**6)

    def steps() -> None:
        for _ in range(STEPS):
            engine.train_step(Segment(engine.step, tokens, tokens, lookback))

    steps()
    rate = STEPS * tokens.size / median(seconds(steps) for _ in range(TURNS))
    row = {"tokens_per_second": rate, "memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    peak = total_peak_flops(given.engine, engine.precision, engine.group)
    if peak:
        row["mfu"] = rate / tokens.size * engine.training_flops / peak
    return row


# ----------------------------------------------------------------------------------------------------- inference


@torch.no_grad()
def inference(lanes: int) -> dict[str, float]:
    """Tokens per second of wt103_base_nvidia, by segments as it is evaluated, beside the peer."""
    from transformers import TransfoXLConfig, TransfoXLLMHeadModel

    experiment = job("wt103_base_nvidia", lanes)
    config = experiment.evaluation.of(experiment.model)
    ours = TransformerXL(config, 267735).to(DEVICE, torch.bfloat16).eval()
    shape: dict[str, Any] = {key: getattr(config, key) for key in ("d_model", "n_head", "d_head", "d_inner", "n_layer")}
    shape |= {key: getattr(config, key) for key in ("cutoffs", "div_val", "mem_len", "clamp_len", "same_length")}
    theirs = TransfoXLLMHeadModel(TransfoXLConfig(vocab_size=267735, d_embed=config.d_model, **shape))
    theirs = theirs.to(DEVICE, torch.bfloat16).eval()
    tokens = text(lanes, config.tgt_len, 267735)  # as evaluation does, ours sends them itself
    given = tokens.to(DEVICE)
    lookback = torch.full_like(tokens, 10**6, device=DEVICE)
    memory = ours.empty_cache(lanes)
    mems = None

    def our_turn() -> None:
        nonlocal memory
        for _ in range(STEPS):
            _, memory = ours({"inputs": tokens, "targets": tokens, "lookback": lookback}, memory)

    def their_turn() -> None:
        nonlocal mems
        for _ in range(STEPS):
            mems = theirs(given, labels=given, mems=mems).mems

    for _ in range(config.mem_len // config.tgt_len):  # until its memory is full
        their_turn()
    our_turn()
    turns = [(seconds(our_turn), seconds(their_turn)) for _ in range(TURNS)]
    count = STEPS * tokens.numel()
    rate, peer = (count / median(column) for column in zip(*turns, strict=True))
    return {"tokens_per_second": rate, "peer": peer, "ratio": rate / peer}


def main() -> None:
    console = Console(highlight=False)
    console.print(kernels())
    rows: dict[str, dict[str, dict[str, float]]] = {"training": {}, "inference": {}}
    table = Table("", "attention by", "tokens/s", "goal", "MFU", "GiB", box=None)
    for name, (_, _, goal) in TRAINING.items():
        for backend, compiled in [*((backend, False) for backend in BACKENDS), ("triton", True)]:
            words = f"{backend}, compiled" if compiled else backend
            row = rows["training"][f"{name}, {words}"] = training(name, backend, compiled)
            mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
            columns = f"{row['tokens_per_second']:,.0f}", f"{goal:,}", mfu, f"{row['memory_gib']:.1f}"
            table.add_row(name, words, *columns)
            torch.cuda.empty_cache()
    console.print(table)
    table = Table("inference, wt103_base_nvidia", "tokens/s", "NVIDIA's", "transformers", "ratio", box=None)
    for lanes, goal in INFERENCE.items():
        row = rows["inference"][str(lanes)] = inference(lanes)
        columns = f"{row['tokens_per_second']:,.0f}", f"{goal:,}", f"{row['peer']:,.0f}", f"{row['ratio']:.1f}"
        table.add_row(f"{lanes} lanes", *columns)
    console.print(table)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit}
    Path(__file__).with_suffix(".json").write_text(json.dumps(machine | rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
