"""Speed and memory on a CPU beside transformers 4.36.2's Transformer-XL: python benchmarks/cpu.py [WORD ...]

Each side has a process of its own, as a user would start it; they work in turn, and the medians of several turns count.
What is measured of one another, and how fast each row should be, stands in `ROWS`; the words choose rows whose names
have them all. A row is printed and added to cpu.json as soon as it is measured: whatever happens to the next one, it is
kept.
"""

import itertools
import json
import multiprocessing
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from txl_dist.cli import CONF, keep_freed_memory
from txl_dist.config.schema import OptimizerConfig, TrainJob
from txl_dist.data.index import Index
from txl_dist.data.lanes import LanePlan
from txl_dist.data.samples import SampleReader
from txl_dist.data.segments import Segment, Segments
from txl_dist.distributed.process_group import process_group
from txl_dist.engine.optimizers import build_optimizer
from txl_dist.engine.zero import ZeroEngine
from txl_dist.evaluation.sampling import Sampler, continuations
from txl_dist.files.atomic import atomic_file
from txl_dist.models.base import Runtime
from txl_dist.models.layers import backends, dropout
from txl_dist.models.layers.dropout import Noise
from txl_dist.models.reformer import Reformer, ReformerConfig
from txl_dist.models.transformer_xl import TransformerXL, TransformerXLConfig
from txl_dist.models.xlnet import XLNet, XLNetConfig
from txl_dist.objectives.causal_lm import CausalLM
from txl_dist.runs.load import load_model

TURNS = 5
Rates = Iterator[float]  # tokens per second, turn by turn
Times = Iterator[float]  # seconds, turn by turn

BYTES = {"vocab_size": 256, "n_layer": 4, "d_model": 256, "n_head": 8, "d_head": 32, "d_inner": 1024}
BYTES_12 = {"vocab_size": 256, "n_layer": 12, "d_model": 512, "n_head": 8, "d_head": 64, "d_inner": 2048}
WORDS = BYTES_12 | {"vocab_size": 267735, "n_layer": 4, "cutoffs": [20000, 40000, 200000], "div_val": 4}
LARGE = BYTES_12 | {"n_layer": 4, "d_model": 1024, "n_head": 16, "d_inner": 4096, "tgt_len": 128, "mem_len": 1600}
MIDDLE = BYTES_12 | {"n_layer": 4, "tgt_len": 128, "mem_len": 640}
PIECES = {"vocab_size": 32000, "n_layer": 4, "d_model": 256, "n_head": 4, "d_head": 64, "d_inner": 1024}
PIECES |= {"tgt_len": 512, "mem_len": 384, "reuse_len": 256}
DROPOUT = {"dropout": 0.1, "dropatt": 0.1}


# ------------------------------------------------------------------------------------------------- the two models


def our_model(vocab_size: int, **shape: Any) -> TransformerXL:
    defaults = OmegaConf.to_container(OmegaConf.load(CONF / "model/transformer_xl.yaml"))
    keep_freed_memory()
    config = TransformerXLConfig(**defaults | {"dropout": 0.0, "tgt_len": 128, "mem_len": 128} | shape)
    return TransformerXL(config, vocab_size)


def their_model(tgt_len: int = 128, mem_len: int = 128, **shape: Any) -> torch.nn.Module:
    from transformers import TransfoXLConfig, TransfoXLLMHeadModel

    defaults = {"cutoffs": [], "div_val": 1, "clamp_len": -1, "dropout": 0.0, "same_length": False, "pre_lnorm": False}
    shape = defaults | {"d_embed": shape["d_model"], "mem_len": mem_len} | shape
    return TransfoXLLMHeadModel(TransfoXLConfig(**shape))


def frequencies(vocab_size: int) -> torch.Tensor:
    """Those of words, of which the first is the most frequent (Zipf's law): [vocab_size]."""
    frequency = 1 / torch.arange(1.0, vocab_size + 1)
    return frequency / frequency.sum()


def text(lanes: int, length: int, vocab_size: int) -> torch.Tensor:
    """Tokens as frequent as words are, int64 [lanes, length]."""
    return torch.multinomial(frequencies(vocab_size), lanes * length, replacement=True).view(lanes, length)


def permuted(lanes: int, vocab_size: int, length: int, reuse_len: int, targets: int) -> dict[str, torch.Tensor]:
    """A batch of permutation language modelling: in each half of a segment some positions, in a random order."""
    rank = torch.zeros(lanes, length, dtype=torch.int64)
    rank[:, reuse_len:] = reuse_len + 1
    positions = torch.zeros(lanes, targets, dtype=torch.int64)
    first = targets // 2
    for lane in range(lanes):
        ahead = torch.randperm(reuse_len)[:first]
        behind = reuse_len + torch.randperm(length - reuse_len)[: targets - first]
        positions[lane] = torch.cat([ahead, behind]).sort()[0]
        rank[lane, ahead] = 1 + torch.arange(first)
        rank[lane, behind] = reuse_len + 2 + torch.arange(targets - first)
    inputs = text(lanes, length, vocab_size)
    return {
        "inputs": inputs,
        "rank": rank,
        "lookback": torch.full((lanes, length), 10**6),
        "segment": (torch.arange(length) > 3 * length // 4).long().expand(lanes, length),
        "direction": torch.tensor([1, -1]).repeat_interleave(lanes // 2)[:, None],  # theirs: forward lanes first
        "positions": positions,
        "targets": inputs.gather(1, positions),
    }


def rates(tokens: int, work: Callable[[], object], at_least: int = 1) -> Rates:
    """A turn takes a second at least: what it finds cold, after the other side's, then counts little.

    In several processes, which all have to do as much, `at_least` is as many times as take longer than that.
    """
    while True:
        began = time.perf_counter()
        times = 0
        taken = 0.0
        while taken < 1 or times < at_least:
            work()
            times += 1
            taken = time.perf_counter() - began
        yield tokens * times / taken


# ------------------------------------------------------------------------------------------------------ the sides


def our_training(lanes: int, **shape: Any) -> Rates:
    model = our_model(**shape).train()
    config = OmegaConf.to_container(OmegaConf.load(CONF / "optimizer/adam.yaml"))
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(OptimizerConfig(**config), parameters, parameters)
    tokens = text(lanes, 129, shape["vocab_size"])
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:]
    lookback = torch.full((lanes, 128), 10**6)
    memory = model.empty_memory(lanes)
    steps = itertools.count()

    def step() -> None:
        nonlocal memory
        noise = Noise.of_step(0, next(steps), range(lanes))
        loss, memory = model({"inputs": inputs, "targets": targets, "lookback": lookback}, memory, noise)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return rates(lanes * 128, step)


class Products(TorchDispatchMode):
    """Records products of matrices: the function, its two factors and its result, the latter as shapes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Callable[..., torch.Tensor], list[tuple[torch.Size, tuple[int, ...]]]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        if function.overloadpacket in PRODUCTS:
            tensors = [*[x for x in args if isinstance(x, torch.Tensor)][-2:], result]
            forms = [(x.shape, x.stride()) for x in tensors]
            self.recorded.append((PRODUCTS[function.overloadpacket], forms))
        return result


PRODUCTS = {torch.ops.aten.mm: torch.mm, torch.ops.aten.addmm: torch.mm}
PRODUCTS |= {torch.ops.aten.bmm: torch.bmm, torch.ops.aten.baddbmm: torch.bmm}


def products_of_training(lanes: int, **shape: Any) -> Rates:
    """Compute the products of a step of `our_training`, of the same shapes and strides, and nothing else."""
    model = our_model(**shape).train()
    tokens = text(lanes, 129, shape["vocab_size"])
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "lookback": torch.full((lanes, 128), 10**6)}
    with Products() as products:
        loss, _ = model(batch, model.empty_memory(lanes), Noise.of_step(0, 0, range(lanes)))
        loss.mean().backward()

    @cache
    def operand(number: int, size: torch.Size, stride: tuple[int, ...]) -> torch.Tensor:
        numbers = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        return torch.randn(numbers).as_strided(size, stride)

    work = []
    for multiply, forms in products.recorded:
        left, right, result = (operand(number, *form) for number, form in enumerate(forms))
        work.append(partial(multiply, left, right, out=result))
    return rates(lanes * 128, lambda: [product() for product in work])


def training_by_torchs_dropout(lanes: int, **shape: Any) -> Rates:
    """Train our model with dropout by torch, which draws one mask for all lanes from its own generator."""
    for module in (dropout, backends):
        module.drop = lambda x, mask, variational=False: torch.nn.functional.dropout(x, mask.p)
    return our_training(lanes, **shape)


def their_training(lanes: int, **shape: Any) -> Rates:
    model = their_model(**shape).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2.5e-4)
    tokens = text(lanes, 128, shape["vocab_size"])
    memory = None

    def step() -> None:
        nonlocal memory
        result = model(tokens, labels=tokens, mems=memory)
        memory = result.mems
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return rates(lanes * 128, step)


def our_pretraining(lanes: int, targets: int, vocab_size: int, **shape: Any) -> Rates:
    defaults = OmegaConf.to_container(OmegaConf.load(CONF / "model/xlnet.yaml"))
    keep_freed_memory()
    config = XLNetConfig(**defaults | shape)
    model = XLNet(config, vocab_size).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    batch = permuted(lanes, vocab_size, config.tgt_len, config.reuse_len, targets)
    memory = model.empty_memory(lanes)
    steps = itertools.count()

    def step() -> None:
        nonlocal memory
        noise = Noise.of_step(0, next(steps), range(lanes))
        loss, memory = model(batch, memory, noise)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return rates(lanes * config.tgt_len, step)


def their_pretraining(lanes: int, targets: int, vocab_size: int, **shape: Any) -> Rates:
    from transformers import XLNetConfig as TheirConfig
    from transformers import XLNetLMHeadModel

    length = shape.pop("tgt_len")
    names = {key: shape[key] for key in ("d_model", "n_layer", "n_head", "d_inner", "mem_len", "reuse_len")}
    options = {"dropout": shape["dropout"], "ff_activation": "gelu_new", "bi_data": True, "use_mems_train": True}
    model = XLNetLMHeadModel(TheirConfig(vocab_size=vocab_size, **names, **options)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    batch = permuted(lanes, vocab_size, length, shape["reuse_len"], targets)
    rank = batch["rank"]
    is_target = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, batch["positions"], True)
    perm_mask = (rank[:, None] >= torch.where(is_target, rank, rank + 1)[:, :, None]).float()
    target_mapping = torch.nn.functional.one_hot(batch["positions"], length).float()
    memory = [torch.zeros(shape["mem_len"], lanes, shape["d_model"])] * shape["n_layer"]

    def step() -> None:
        nonlocal memory
        result = model(
            batch["inputs"],
            token_type_ids=batch["segment"],
            perm_mask=perm_mask,
            target_mapping=target_mapping,
            mems=memory,
            labels=batch["targets"],
            use_mems=True,
        )
        memory = result.mems
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return rates(lanes * length, step)


def our_reformer(length: int, n_hashes: int, reverses: bool) -> Rates:
    """Train on one segment; `reverses`: keep no activations, as theirs does."""
    defaults = OmegaConf.to_container(OmegaConf.load(CONF / "model/reformer.yaml"))
    keep_freed_memory()
    shape = {"tgt_len": length, "axial_shape": [64, length // 64], "n_hashes": n_hashes, "n_buckets": length // 32}
    config = ReformerConfig(**defaults | shape | {"dropout": 0.0, "dropatt": 0.0})
    model = Reformer(config, 256, Runtime(activation_checkpointing=reverses)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    tokens = text(1, length, 256)
    batch = {"inputs": tokens, "targets": tokens, "lookback": torch.full((1, length), 10**6)}
    steps = itertools.count()

    def step() -> None:
        loss, _ = model(batch, model.empty_memory(1), Noise.of_step(0, next(steps), range(1)))
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return rates(length, step)


def their_reformer(length: int, n_hashes: int, **_: Any) -> Rates:
    from transformers import ReformerConfig as TheirConfig
    from transformers import ReformerModelWithLMHead

    config = OmegaConf.to_container(OmegaConf.load(CONF / "model/reformer.yaml"))
    theirs = TheirConfig(
        attn_layers=config["attn_layers"] * 3,
        hidden_size=config["d_model"],
        num_attention_heads=config["n_head"],
        attention_head_size=config["d_head"],
        feed_forward_size=config["d_inner"],
        axial_pos_shape=[64, length // 64],
        axial_pos_embds_dim=config["axial_widths"],
        max_position_embeddings=length,
        num_hashes=n_hashes,
        num_buckets=length // 32,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
        vocab_size=256,
        is_decoder=True,
    )
    model = ReformerModelWithLMHead(theirs).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    tokens = text(1, length, 256)

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return rates(length, step)


def our_reading(length: int, lanes: int = 1, **shape: Any) -> Rates:
    """Evaluation by segments of `length`; 1: generation, each step's distribution in full."""
    model = our_model(**shape).eval()
    model.store_long_rows()
    tokens = text(lanes, length, shape["vocab_size"])
    targets = tokens if length > 1 else None
    lookback = torch.full((lanes, length), 10**6)
    memory = model.empty_cache(lanes)

    @torch.no_grad()
    def read() -> None:
        nonlocal memory
        _, memory = model({"inputs": tokens, "targets": targets, "lookback": lookback}, memory)

    return rates(lanes * length, read)


def their_reading(length: int, lanes: int = 1, **shape: Any) -> Rates:
    model = their_model(**shape).eval()
    tokens = text(lanes, length, shape["vocab_size"])
    memory = None
    labels = tokens if length > 1 else None
    with torch.no_grad():  # as ours, theirs begins with a full memory
        for past in text(lanes, shape["mem_len"], shape["vocab_size"]).split(128, dim=1):
            memory = model(past, mems=memory).mems

    @torch.no_grad()
    def read() -> None:
        nonlocal memory
        memory = model(tokens, labels=labels, mems=memory).mems

    return rates(lanes * length, read)


def our_processes(zero_stage: int, lanes: int, vocab_size: int, **shape: Any) -> Rates:
    """Train by the engine that txl_dist.train uses, in each of several processes, on drawn tokens."""
    keep_freed_memory()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        keys = [*SHAPE, "optimizer=adam", f"data.num_lanes={lanes}", f"engine.zero_stage={zero_stage}"]
        given = OmegaConf.to_container(compose("train", keys), resolve=True)
    engine = ZeroEngine(TypeAdapter(TrainJob).validate_python(given), CausalLM(), vocab_size, process_group(), None)
    tokens = text(len(engine.lanes), 129, vocab_size).numpy()
    lookback = np.full((len(engine.lanes), 128), 10**6)

    def step() -> None:
        engine.train_step(Segment(engine.step, tokens[:, :-1], tokens[:, 1:], lookback))

    return rates(lanes * 128, step, at_least=20)


def their_processes(lanes: int, **shape: Any) -> Rates:
    """Train the same module by torch's DistributedDataParallel, with clipping and the same optimizer."""
    torch.distributed.init_process_group("gloo")
    local_lanes = lanes // torch.distributed.get_world_size()
    torch.manual_seed(1)
    module = our_model(**shape).train()
    model = DistributedDataParallel(module)
    optimizer = torch.optim.Adam(model.parameters(), lr=2.5e-4, fused=True)
    tokens = text(local_lanes, 129, shape["vocab_size"])
    lookback = torch.full((local_lanes, 128), 10**6)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "lookback": lookback}
    memory = module.empty_memory(local_lanes)

    def step() -> None:
        nonlocal memory
        loss, memory = model(batch, memory)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        optimizer.zero_grad()

    return rates(lanes * 128, step, at_least=20)


def our_draws(vocab_size: int, **options: Any) -> Times:
    """Draw a token."""
    generators = [torch.Generator().manual_seed(1)]
    log_probs = frequencies(vocab_size).log()[None]
    sampler = Sampler(**options)
    return (1000 / rate for rate in rates(1, lambda: sampler.draw(log_probs, generators)))


def sorted_draws(vocab_size: int, temperature: float, top_k: int, top_p: float) -> Times:
    """Draw a token of the same distribution, by sorting the vocabulary where it is cut."""
    log_probs = frequencies(vocab_size).log()[None]

    def draw() -> torch.Tensor:
        probabilities = (log_probs / temperature).softmax(-1)
        if top_k or top_p < 1:
            probabilities, tokens = probabilities.sort(descending=True)
            probabilities[:, top_k or vocab_size :] = 0
            probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
            return tokens.gather(1, probabilities.multinomial(1))
        return probabilities.multinomial(1)

    return (1000 / rate for rate in rates(1, draw))


PROMPTS = 32
NEW_TOKENS = 20


def our_continuations(run: str, **options: Any) -> Rates:
    """Continue prompts of 16 tokens side by side, reading them included."""
    keep_freed_memory()
    model, _ = load_model(run)
    prompts = text(PROMPTS, 16, model.vocab_size).tolist()
    sampler = Sampler(**options)
    return rates(
        PROMPTS * NEW_TOKENS, lambda: list(itertools.islice(continuations(model, prompts, sampler), NEW_TOKENS))
    )


def their_continuations(exported: str, transformers5: str, **options: Any) -> Rates:
    """Continue them by transformers' `generate`, on the folder that txl_dist.convert has exported."""
    sys.path.insert(0, transformers5)  # the environment's own is 4.36.2
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    prompts = text(PROMPTS, 16, model.config.vocab_size)
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "eos_token_id": None}
    mask = torch.ones_like(prompts)
    work = partial(model.generate, prompts, attention_mask=mask, do_sample=True, **lengths, **options)
    return rates(PROMPTS * NEW_TOKENS, work)


def loader(data: str) -> Rates:
    """The segments of 256 lanes of 384 tokens, on one core."""
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    index = Index.open(data)
    plan = LanePlan(index.splits["train"].document_starts, 256, 384, seed=1)
    segments = iter(Segments(plan, SampleReader(index, "train"), range(256), index.eos, 0, 2**62))
    return rates(256 * 384, lambda: next(segments))


SHAPE = [f"model.{key}={value}" for key, value in BYTES.items() if key != "vocab_size"]
SHAPE += ["model.tgt_len=128", "model.mem_len=128", "model.dropout=0.0", "data.num_lanes=8"]


def training_command(data: str, zero_stage: int, processes: int = 1, **environment: str) -> Rates:
    """`torchrun -m txl_dist.train` as a user starts it; what it logs of its last 20 steps."""
    while True:
        with tempfile.TemporaryDirectory() as folder:
            start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
            keys = [f"data.dir={data}", f"run.dir={folder}/run", "train.stop_at=40", "tracking.log_every=20"]
            keys += [f"engine.zero_stage={zero_stage}", "tracking.mode=disabled"]
            job = [*start, "-m", "txl_dist.train", *SHAPE, *keys]
            subprocess.run(job, check=True, capture_output=True, env=os.environ | environment)
            lines = map(json.loads, Path(folder, "run/metrics.jsonl").read_text().splitlines())
            yield [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line][-1]


def help_time() -> Times:
    """`python -m txl_dist.train --help`, from the start of the process to its end."""
    while True:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "txl_dist.train", "--help"], check=True, capture_output=True)
        yield time.perf_counter() - began


def start_time(data: str) -> Times:
    """`python -m txl_dist.train`, from the start of the process until its first step is done, as its metrics say."""
    while True:
        with tempfile.TemporaryDirectory() as folder:
            keys = [f"data.dir={data}", f"run.dir={folder}/run", "train.stop_at=1", "tracking.log_every=1"]
            began = time.time()
            job = [sys.executable, "-m", "txl_dist.train", *SHAPE, *keys, "tracking.mode=disabled"]
            subprocess.run(job, check=True, capture_output=True)
            first, *_ = Path(folder, "run/metrics.jsonl").read_text().splitlines()
            yield json.loads(first)["time"] - began


def bare_loop(data: str) -> Rates:
    """Train the same module on the same text, with clipping and torch's own Adam, and nothing else."""
    index = Index.open(data)
    model = our_model(**BYTES | {"vocab_size": index.vocab_size}).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2.5e-4, fused=True)
    plan = LanePlan(index.splits["train"].document_starts, 8, 128, seed=1)
    segments = Segments(plan, SampleReader(index, "train"), range(8), index.eos, 0, 2**62)
    memory = model.empty_memory(8)
    coming = iter(segments)

    def step() -> None:
        nonlocal memory
        segment = next(coming)
        loss, memory = model(CausalLM().batch(segment), memory)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        optimizer.zero_grad()

    return rates(8 * 128, step)


# ------------------------------------------------------------------------------------------------------- the rows


@dataclass
class Row:
    """What one side does as fast as another.

    Attributes:
        goal: how many times as many tokens per second as `theirs`; without these, and for times, a value in `unit`.
        arguments: of `ours`; those whose keys are in `PLACES` are filled in.
        theirs_arguments: of `theirs`, where they are others.
        unit: of what a turn of a side gives.
        processes: of each side; several have one thread each.
        products: a third side, which computes the products of ours and nothing else. `share` is how much of our time
            they would take so: the share of the machine's own peak, for these shapes, at which a step computes.
    """

    goal: float
    ours: Callable[..., Iterator[float]]
    theirs: Callable[..., Iterator[float]] | None
    arguments: dict[str, Any]
    theirs_arguments: dict[str, Any] | None = None
    unit: str = "tokens/s"
    processes: int = 1
    products: Callable[..., Rates] | None = None

    def ratio(self, ours: float, theirs: float) -> float:
        """Return how many times as fast we are."""
        return ours / theirs if self.unit == "tokens/s" else theirs / ours


TRAINING = {
    "bytes, 4 x 256, 8 lanes of 128 + 128": BYTES | {"lanes": 8},
    "bytes, 12 x 512, 4 lanes of 128 + 128": BYTES_12 | {"lanes": 4},
    "267,735 words, 4 x 512, 4 lanes of 128 + 128": WORDS | {"lanes": 4},
}
DRAWS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for temperature, top_k, top_p in itertools.product((1.0, 0.8), (0, 40), (1.0, 0.9))
]

ROWS = {
    **{
        f"training, {name}": Row(2, our_training, their_training, arguments, products=products_of_training)
        for name, arguments in TRAINING.items()
    },
    "dropout by lanes against torch's, 4 x 256": Row(
        0.97, our_training, training_by_torchs_dropout, BYTES | DROPOUT | {"lanes": 8}
    ),
    "dropout by lanes against torch's, 12 x 512": Row(
        0.97, our_training, training_by_torchs_dropout, BYTES_12 | DROPOUT | {"lanes": 4}
    ),
    "XLNet, 32,000 pieces, 4 x 256, 4 lanes of 512 + 384": Row(
        2.5, our_pretraining, their_pretraining, PIECES | DROPOUT | {"lanes": 4, "targets": 85}
    ),
    "XLNet without dropout": Row(
        2, our_pretraining, their_pretraining, PIECES | {"dropout": 0.0, "dropatt": 0.0, "lanes": 4, "targets": 85}
    ),
    **{
        f"Reformer, 6 x 256, {rounds} rounds, {length:,}, {'reversed' if reverses else 'stored'}": Row(
            1.5, our_reformer, their_reformer, {"length": length, "n_hashes": rounds, "reverses": reverses}
        )
        for rounds, length, reverses in itertools.product((2, 4), (4096, 16384), (False, True))
    },
    "evaluation, 4 x 1024, 128 + 1,600": Row(3, our_reading, their_reading, LARGE | {"length": 128}),
    "generation, 4 x 512, 1 + 640": Row(7, our_reading, their_reading, MIDDLE | {"length": 1}),
    "generation, 4 x 1024, 1 + 1,600": Row(15, our_reading, their_reading, LARGE | {"length": 1}),
    **{
        f"generation, 32 prompts, 267,735 words, 4 x 512, 1 + 640, {cut} {value}": Row(
            1,
            our_continuations,
            their_continuations,
            {"run": "", "temperature": 0.8, cut: value},
            {"exported": "", "transformers5": "", "temperature": 0.8, "top_k": 0, cut: value},
        )
        for cut, value in (("top_k", 40), ("top_p", 0.9))
    },
    **{
        f"a draw of 267,735 words, {', '.join(f'{key} {value}' for key, value in options.items())}": Row(
            2, our_draws, sorted_draws, {"vocab_size": 267735, **options}, unit="ms"
        )
        for options in DRAWS
    },
    **{
        f"two processes, ZeRO {stage}, against DistributedDataParallel": Row(
            1,
            our_processes,
            their_processes,
            BYTES | {"lanes": 8, "zero_stage": stage},
            BYTES | {"lanes": 8},
            processes=2,
        )
        for stage in (0, 1)
    },
    "--help": Row(1, help_time, None, {}, unit="s"),
    "start of training, until its first step is done": Row(5, start_time, None, {"data": ""}, unit="s"),
    "loader, 256 lanes of 384, one core": Row(20e6, loader, None, {"data": ""}),
    "training command against a bare loop": Row(
        0.97, training_command, bare_loop, {"data": "", "zero_stage": 0}, {"data": ""}
    ),
    "two processes against one, a thread each": Row(
        1.8,
        training_command,
        training_command,
        {"data": "", "zero_stage": 1, "processes": 2, "OMP_NUM_THREADS": "1"},
        {"data": "", "zero_stage": 1, "OMP_NUM_THREADS": "1"},
    ),
}


def work(side: Callable[..., Rates], arguments: dict[str, Any], pipe: Connection) -> None:
    """A side's process: a turn whenever it is asked, then the peak of its memory, in MiB above that before it began."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    turns = side(**arguments)
    while pipe.recv():
        pipe.send(next(turns))
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


class Side:
    """The processes of a side, which take their turns together."""

    def __init__(self, side: Callable[..., Iterator[float]], arguments: dict[str, Any], processes: int):
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        self.processes = []
        for environment in environments(processes):
            pipe, theirs = context.Pipe()
            self.pipes.append(pipe)
            self.processes.append(context.Process(target=work, args=(side, arguments, theirs)))
            with patch.dict(os.environ, environment):
                self.processes[-1].start()

    def turn(self) -> float:
        return self._ask(True)

    def end(self) -> float:
        peak = self._ask(False)
        for process in self.processes:
            process.join()
        return peak

    def _ask(self, for_turn: bool) -> float:
        for pipe in self.pipes:
            pipe.send(for_turn)
        return [pipe.recv() for pipe in self.pipes][0]


def environments(processes: int) -> list[dict[str, str]]:
    """Return the variables of each process; several find each other by them, and have a thread each."""
    if processes == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
    }
    common["LOCAL_WORLD_SIZE"] = str(processes)
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def measure(row: Row, places: dict[str, str]) -> dict[str, float]:
    given = {"ours": (row.ours, row.arguments), "theirs": (row.theirs, row.theirs_arguments or row.arguments)}
    given["products"] = row.products, row.arguments
    sides = {}
    for name, (kind, arguments) in given.items():
        if kind:
            filled = arguments | {key: places[key] for key in arguments if key in places}
            sides[name] = Side(kind, filled, row.processes)
    turns = [{name: side.turn() for name, side in sides.items()} for _ in range(TURNS + 1)][1:]  # the first warms up
    measured = {name: median(turn[name] for turn in turns) for name in sides}
    measured |= {f"{name}_peak_mib": side.end() for name, side in sides.items()}
    if row.theirs:
        measured["ratio"] = median(row.ratio(turn["ours"], turn["theirs"]) for turn in turns)
    if row.products:
        measured["share"] = median(turn["ours"] / turn["products"] for turn in turns)
    return measured | {"goal": row.goal}


# ----------------------------------------------------------------------------------------- what must be there before


def python(*command: str) -> None:
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)


def prepare_bytes(places: dict[str, str]) -> None:
    python("txl_dist.prepare", "corpus=stdlib", "tokenizer=bytes", f"data.dir={places['data']}")


def train_on_words(places: dict[str, str]) -> None:
    """Train a run for a step, so that it is there; its vocabulary is <eos>, <unk> and words without a meaning."""
    words = f"{places['run']}.words"
    splits = []
    for split, number in (("train", 267733), ("valid", 3000), ("test", 3000)):
        path = Path(f"{places['run']}-{split}.txt")
        path.write_text("".join(f"w{word}\n" if word % 20 == 0 else f"w{word} " for word in range(number)))
        splits.append(f"corpus.{split}={path}")
    python("txl_dist.prepare", "corpus=text", "tokenizer=word", *splits, f"data.dir={words}")
    shape = [f"model.{key}={value}".replace(" ", "") for key, value in (WORDS | MIDDLE).items() if key != "vocab_size"]
    keys = ["data.num_lanes=1", "train.stop_at=1", "train.eval_every=1000", "tracking.mode=disabled"]
    python("txl_dist.train", *shape, *keys, f"data.dir={words}", f"run.dir={places['run']}")


def export_run(places: dict[str, str]) -> None:
    python("txl_dist.convert", f"run={places['run']}", f"to={places['exported']}")


def install_transformers5(places: dict[str, str]) -> None:
    pins = Path(__file__).parents[1] / "tests/conversion/transformers5.txt"
    python("pip", "install", "--quiet", "--no-deps", "--target", places["transformers5"], "--requirement", str(pins))


PLACES: dict[str, Callable[[dict[str, str]], None]] = {
    "data": prepare_bytes,
    "run": train_on_words,
    "exported": export_run,
    "transformers5": install_transformers5,
}

# ---------------------------------------------------------------------------------------------------- the results

FILE = Path(__file__).with_suffix(".json")
COLUMNS = {"ours": "{:,.4g}", "theirs": "{:,.4g}", "ratio": "{:.2f}", "goal": "{:,g}", "share": "{:.3f}"}
COLUMNS |= {"ours_peak_mib": "{:,.0f}", "theirs_peak_mib": "{:,.0f}"}


def add_row(name: str, unit: str, measured: dict[str, float]) -> None:
    """Print a row, and add it to cpu.json with what it was measured on."""
    cells = [form.format(measured[key]) if measured.get(key) else "" for key, form in COLUMNS.items()]
    print(f"{name:72}{unit:>9}", *(f"{cell:>10}" for cell in cells), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    machine |= {"torch": torch.__version__, "commit": commit}
    known = json.loads(FILE.read_text())["rows"] if FILE.exists() else {}
    known[name] = measured | {"unit": unit} | machine
    with atomic_file(FILE) as temporary:
        temporary.write_text(json.dumps({"rows": known}, indent=1) + "\n")


def main() -> None:
    chosen = {name: row for name, row in ROWS.items() if all(word in name for word in sys.argv[1:])}
    print(f"{'':72}{'unit':>9}", *(f"{name:>10}" for name in [*list(COLUMNS)[:5], "MiB", "theirs"]))
    with tempfile.TemporaryDirectory() as folder:
        places = {key: f"{folder}/{key}" for key in PLACES}
        needed = {key for row in chosen.values() for key in (row.arguments | (row.theirs_arguments or {}))}
        for key, prepare in PLACES.items():
            if key in needed:
                prepare(places)
        for name, row in chosen.items():
            add_row(name, row.unit, measure(row, places))


if __name__ == "__main__":
    main()
