"""Kernels, training and inference on one GPU, a row at a time; benchmarks/gpu-all.sh runs them all.

    python benchmarks/gpu.py kernels triton                   a backend of attention held against float64
    python benchmarks/gpu.py training wt103_large triton      the engine that txl_dist.train uses, on drawn tokens
    python benchmarks/gpu.py turns wt103_large softmax        with a new way of ours and without, in turn: see SWITCHES
    python benchmarks/gpu.py profile wt103_large triton       three steps, by kernel: profile-wt103_large-triton.*
    python benchmarks/gpu.py inference 32                     reading, beside transformers 4.36.2's of the same shape
    python benchmarks/gpu.py generation 32                    drawing and reading one token of each lane at a time

A row is printed and added to gpu.json, in $OUT or the working directory, as soon as it is measured: whatever happens to
the next one, it is kept. Medians of several turns. TXL_DIST_TINY=1 makes everything small, for a CPU.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from cpu import text
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from txl_dist.cli import CONF
from txl_dist.config.schema import TrainJob
from txl_dist.data.segments import Segment
from txl_dist.distributed.process_group import exit_process, process_group
from txl_dist.engine import engine
from txl_dist.engine.engine import Engine, deepspeed_config
from txl_dist.engine.zero import ZeroEngine
from txl_dist.evaluation.reading import Memory
from txl_dist.evaluation.sampling import Sampler
from txl_dist.evaluation.token_graph import eager_reader, token_reader
from txl_dist.models.layers import cross_entropy
from txl_dist.models.layers.backends import BACKENDS, AttentionWindow, RelativePositions, attend
from txl_dist.models.layers.dropout import Dropout, Mask, Noise, ReluDropout
from txl_dist.models.transformer_xl import TransformerXL
from txl_dist.objectives.causal_lm import CausalLM
from txl_dist.tracking.gpu_peak import total_peak_flops

TINY = os.environ.get("TXL_DIST_TINY") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TURNS = 2 if TINY else 5
STEPS = 1 if TINY else 4
ROWS = Path(os.environ.get("OUT", "."), "gpu.json")

# Lanes, vocabulary, and tokens per second to be reached: NVIDIA's of eight A100 (both wt103), and what we count on.
TRAINING = {
    "wt103_large": (64, 267735, 191_148),
    "wt103_base_nvidia": (128, 267735, 449_890),
    "enwik8_large": (32, 205, 160_000),
}
# Lanes and NVIDIA's tokens per second of wt103_base_nvidia on one A100 by TorchScript.
INFERENCE = {1: 6_936, 32: 107_082}
# Length, memory, n_head, d_head, how far back queries look (None: to the start of a document), dropout.
KERNELS: list[tuple[int, int, int, int, int | None, float]] = [
    (384, 384, 16, 64, 10**6, 0.0),
    (384, 384, 16, 64, 10**6, 0.2),
    (192, 192, 8, 64, 10**6, 0.0),
    (150, 150, 10, 41, 10**6, 0.1),
    (768, 768, 8, 128, 10**6, 0.15),
    (64, 640, 8, 64, 639, 0.0),
    (128, 128, 4, 64, None, 0.0),
]
SMALLER = ["model.n_layer=1", "model.d_model=32", "model.n_head=2", "model.d_head=16", "model.d_inner=32"]
SMALLER += ["model.tgt_len=8", "model.mem_len=8"]
if TINY:
    TRAINING = {name: (2, vocab_size, goal) for name, (_, vocab_size, goal) in TRAINING.items()}
    KERNELS = [(8, 8, 2, 16, 10**6, 0.0), (8, 8, 2, 16, None, 0.5)]

Row = dict[str, Any]


def job(name: str, lanes: int, *options: str) -> TrainJob:
    overrides = [f"+experiment={name}", f"data.num_lanes={lanes}", *(SMALLER if TINY else []), *options]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return TypeAdapter(TrainJob).validate_python(OmegaConf.to_container(compose("train", overrides), resolve=True))


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------- kernels

NAMES = ["result", "query", "key", "value", "r", "u", "v"]


def kernels(backend: str) -> dict[str, Row]:
    """Hold the result and the six gradients against float64, or with dropout against a second time."""
    return {f"kernels {backend} {shape}": kernel_row(backend, *shape) for shape in KERNELS}


def kernel_row(
    backend: str, length: int, mem_len: int, n_head: int, d_head: int, lookback: int | None, dropout: float
) -> Row:
    """The largest differences, as shares of the largest number.

    Raises:
        AssertionError: where one is more than twice that of the plain formula in bfloat16, or not a number, or where
            the same is not the same to the bit a second time.
    """
    given = attention_inputs(length, mem_len, n_head, d_head)
    back = torch.arange(length, device=DEVICE) % 50 if lookback is None else torch.full((length,), lookback)
    window = back.to(DEVICE).expand(2, length).contiguous()

    def results(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in given]  # rounded first: all compute from the same
        query, key, value, r, u, v = leaves
        mask = Mask(dropout, torch.tensor([5, 6], device=DEVICE)) if dropout else None
        positions = RelativePositions(query + v, r, None)
        past, present = torch.stack([key, value]).split([mem_len, length], dim=2)
        out = attend(backend, query + u, past, present, positions, AttentionWindow(window, mem_len, dtype), mask)
        weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).bfloat16().to(dtype)
        return [out, *torch.autograd.grad(out, leaves, weight)]

    once, twice = results(backend, torch.bfloat16), results(backend, torch.bfloat16)
    if backend == "triton" or not dropout:  # torch's own draws another mask each time
        assert all(map(torch.equal, once, twice)), f"{backend} gives other bits a second time"
    assert all(x.isfinite().all() for x in once), f"{backend} gives what is not finite"
    if dropout:
        return {"same_bits_twice": backend == "triton"}
    right = results("reference", torch.float64)
    row = dict(zip(NAMES, map(error, once, right), strict=True))
    plain = dict(zip(NAMES, map(error, results("reference", torch.bfloat16), right), strict=True))
    worse = [name for name in NAMES if not row[name] <= 2 * plain[name]]  # not a number is worse, too
    assert not worse, f"{backend} is off by more than twice the formula in {', '.join(worse)}"
    return row


def attention_inputs(length: int, mem_len: int, n_head: int, d_head: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    keys = mem_len + length
    shapes = [(2, length), (2, keys), (2, keys), (keys + 1,), (), ()]
    return [torch.randn(*shape, n_head, d_head, device=DEVICE) for shape in shapes]


def error(result: torch.Tensor, right: torch.Tensor) -> float:
    return float((result.double() - right).abs().max() / right.abs().max())


# ------------------------------------------------------------------------------------------------------ training


class Switch(NamedTuple):
    """Two ways to do the same.

    Attributes:
        keys: that choose the new way, or the old one where `old` has none.
        old: while it is entered, the old way is taken.
    """

    keys: dict[bool, list[str]]
    old: Callable[[], AbstractContextManager]


def relu_then_dropout(self: ReluDropout, x: torch.Tensor, noise: Noise | None = None) -> torch.Tensor:
    return Dropout.forward(self, x.relu(), noise)


def checking_config(job: TrainJob, micro_batch: int, precision: str) -> dict[str, Any]:
    config = deepspeed_config(job, micro_batch, precision)
    return config | {"bf16": {"enabled": precision == "bf16"}, "timers": {}, "gradient_clipping": job.optimizer.clip}


COMPILED = {is_new: [f"engine.compile={str(is_new).lower()}"] for is_new in (True, False)}
SAME: dict[bool, list[str]] = {True: [], False: []}
SWITCHES = {
    "compile": Switch(COMPILED, nullcontext),
    "softmax": Switch(SAME, partial(patch.object, cross_entropy, "HAS_TRITON", False)),
    "relu": Switch(SAME, partial(patch.object, ReluDropout, "forward", relu_then_dropout)),
    "checks": Switch(SAME, partial(patch.object, engine, "deepspeed_config", checking_config)),
}


@contextmanager
def training_engine(name: str, *options: str) -> Iterator[Engine]:
    """An engine that is closed in the end: else its memory would not come back."""
    lanes, vocab_size, _ = TRAINING[name]
    precision = "bf16" if DEVICE.type == "cuda" else "fp32"
    keys = ["optimizer=adam", "engine.zero_stage=1", f"engine.precision={precision}", *options]
    built = ZeroEngine(job(name, lanes, *keys), CausalLM(), vocab_size, process_group(), None)
    try:
        yield built
    finally:
        built.close()
        gc.collect()


def steps_of(built: Engine, losses: list[torch.Tensor]) -> Callable[[], None]:
    """Some training steps on drawn tokens."""
    tokens = text(len(built.lanes), built.job.model.tgt_len, built.model.vocab_size).numpy()
    lookback = np.full_like(tokens, 10**6)

    def steps() -> None:
        for _ in range(STEPS):
            losses.append(built.train_step(Segment(built.step, tokens, tokens, lookback)))

    return steps


def training(name: str, backend: str) -> dict[str, Row]:
    """Tokens per second, share of the peak, and peak memory in GiB."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with training_engine(name, f"engine.attention={backend}") as built:
        return {f"training {name} {backend}": training_row(built) | {"goal": TRAINING[name][2]}}


def training_row(built: Engine) -> Row:
    losses: list[torch.Tensor] = []
    steps = steps_of(built, losses)
    steps()
    rate = STEPS * built.job.tokens_per_step / median(seconds(steps) for _ in range(TURNS))
    assert all(loss.isfinite() for loss in losses), "the loss is not finite"
    row: Row = {"tokens_per_second": rate}
    if DEVICE.type == "cuda":
        row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    peak = total_peak_flops(built.job.engine, built.precision, built.group)
    if peak:
        row["mfu"] = rate / built.job.tokens_per_step * built.training_flops / peak
    return row


def turns(name: str, switch: str) -> dict[str, Row]:
    """Tokens per second of a new way of ours and of the old one, in turn, and by how much the new one is faster."""
    given = SWITCHES[switch]
    times: dict[bool, list[float]] = {True: [], False: []}
    with ExitStack() as stack:
        steps = {}
        for is_new in times:
            with nullcontext() if is_new else given.old():
                built = stack.enter_context(training_engine(name, *given.keys[is_new]))
                steps[is_new] = steps_of(built, [])
                steps[is_new]()
        for _ in range(TURNS):
            for is_new, taken in times.items():
                with nullcontext() if is_new else given.old():
                    taken.append(seconds(steps[is_new]))
        tokens = STEPS * built.job.tokens_per_step
    new, old = (tokens / median(times[is_new]) for is_new in (True, False))
    return {f"turns {name} {switch}": {"new": new, "old": old, "ratio": new / old}}


def profile(name: str, backend: str) -> dict[str, Row]:
    """The kernels of three steps in a table, and a trace of them."""
    stem = ROWS.with_name(f"profile-{name}-{backend}")
    with training_engine(name, f"engine.attention={backend}") as built:
        steps = steps_of(built, [])
        steps()
        synchronize()
        with torch.profiler.profile() as profiler:
            for _ in range(-(-3 // STEPS)):
                steps()
            synchronize()
    profiler.export_chrome_trace(f"{stem}.json.gz")
    column = "self_cuda_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    kernels = profiler.key_averages()
    stem.with_suffix(".txt").write_text(kernels.table(sort_by=column, row_limit=60, max_name_column_width=80))
    return {f"profile {name} {backend}": {"kinds_of_kernels": len(kernels)}}


# ----------------------------------------------------------------------------------------------------- inference


def evaluated_model(lanes: int) -> TransformerXL:
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    return TransformerXL(job("wt103_base_nvidia", lanes).evaluated_model, 267735).to(DEVICE, dtype).eval()


@torch.no_grad()
def inference(given_lanes: str) -> dict[str, Row]:
    """Tokens per second of wt103_base_nvidia, by segments as it is evaluated, beside the peer; and ms a segment."""
    from transformers import TransfoXLConfig, TransfoXLLMHeadModel

    lanes = int(given_lanes)
    ours = evaluated_model(lanes)
    config = ours.config
    shape: dict[str, Any] = {key: getattr(config, key) for key in ("d_model", "n_head", "d_head", "d_inner", "n_layer")}
    shape |= {key: getattr(config, key) for key in ("cutoffs", "div_val", "mem_len", "clamp_len", "same_length")}
    theirs = TransfoXLLMHeadModel(TransfoXLConfig(vocab_size=267735, d_embed=config.d_model, **shape))
    theirs = theirs.to(DEVICE, next(ours.parameters()).dtype).eval()
    tokens = text(lanes, config.tgt_len, 267735)  # as evaluation does, ours sends them itself
    sent = tokens.to(DEVICE)
    lookback = torch.full_like(sent, 10**6)
    memory = ours.empty_cache(lanes)
    mems = None

    def our_segment() -> None:
        nonlocal memory
        _, memory = ours({"inputs": tokens, "targets": tokens, "lookback": lookback}, memory)

    def their_segment() -> None:
        nonlocal mems
        mems = theirs(sent, labels=sent, mems=mems).mems

    def several(segment: Callable[[], None]) -> Callable[[], None]:
        return lambda: [segment() for _ in range(STEPS)] and None

    for _ in range(-(-config.mem_len // config.tgt_len)):  # until their memories are full
        our_segment()
        their_segment()
    turns = [(seconds(several(our_segment)), seconds(several(their_segment))) for _ in range(TURNS)]
    rate, peer = (STEPS * tokens.numel() / median(column) for column in zip(*turns, strict=True))
    alone = 1000 * median(seconds(our_segment) for _ in range(TURNS * STEPS))
    row: Row = {"tokens_per_second": rate, "goal": INFERENCE.get(lanes), "peer": peer, "ratio": rate / peer}
    return {f"inference {lanes}": row | {"ms_per_segment_synchronized": alone}}


@torch.no_grad()
def generation(given_lanes: str) -> dict[str, Row]:
    """Tokens per second of wt103_base_nvidia, a token of each lane at a time, by a CUDA graph and without, in turn."""
    lanes = int(given_lanes)
    model = evaluated_model(lanes)
    sampler = Sampler(top_k=40)
    generators = [torch.Generator().manual_seed(lane) for lane in range(lanes)]
    log_probs = torch.zeros(lanes, model.vocab_size, device=DEVICE)

    def tokens_by(read_token: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def draw_and_read() -> None:
            following = log_probs
            for _ in range(8 * STEPS):
                following = read_token(sampler.draw(following, generators))

        return draw_and_read

    readers = token_reader(model, Memory.empty(model, lanes)), eager_reader(model, Memory.empty(model, lanes))
    by_graph, eager = map(tokens_by, readers)
    by_graph(), eager()
    turns = [(seconds(by_graph), seconds(eager)) for _ in range(TURNS)]
    rate, other = (8 * STEPS * lanes / median(column) for column in zip(*turns, strict=True))
    return {f"generation {lanes}": {"tokens_per_second": rate, "without_a_graph": other, "ratio": rate / other}}


# ---------------------------------------------------------------------------------------------------------- rows


def add_rows(rows: dict[str, Row]) -> None:
    """Print rows, and add them to gpu.json with what they were measured on."""
    known = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    for name, row in rows.items():
        shown = ", ".join(f"{key} {value:,.4g}" for key, value in row.items() if isinstance(value, int | float))
        print(f"{name}: {shown or row}", flush=True)
        known[name] = machine() | row
    temporary = ROWS.with_suffix(".tmp")
    temporary.write_text(json.dumps(known, indent=1) + "\n")
    temporary.replace(ROWS)


def machine() -> Row:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"machine": name, "torch": torch.__version__, "commit": commit}


def main() -> int:
    kinds: dict[str, Callable[..., dict[str, Row]]] = {
        function.__name__: function for function in (kernels, training, turns, profile, inference, generation)
    }
    if len(sys.argv) < 3 or sys.argv[1] not in kinds:
        print(__doc__, file=sys.stderr)
        return 2
    kind, *given = sys.argv[1:]
    if kind in ("kernels", "training", "profile"):
        assert given[-1] in BACKENDS, f"no such backend: {given[-1]}"
    try:
        add_rows(kinds[kind](*given))
    except torch.OutOfMemoryError as failure:
        add_rows({" ".join([kind, *given]): {"failed": f"out of memory: {failure}".splitlines()[0]}})
        return 1
    except AssertionError as failure:
        add_rows({" ".join([kind, *given]): {"failed": str(failure)}})
        return 1
    return 0


if __name__ == "__main__":
    exit_process(main())
