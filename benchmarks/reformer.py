"""Peak memory of a Reformer's training step by length and depth: python benchmarks/reformer.py [LENGTH ...]

Beside it transformers 4.36.2's Reformer, and a plain Transformer with torch's attention and checkpointed layers, of
the same sizes, one sequence, float32. Each is a process of its own; what counts is the peak above what it had before
the model was built. Without lengths: 4096 and 16384; 65536 takes long, because of full attention. A row is added to
reformer.json as soon as it is measured.
"""

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from txl_dist.cli import CONF
from txl_dist.files.atomic import atomic_file
from txl_dist.models.base import Runtime
from txl_dist.models.layers.dropout import Noise
from txl_dist.models.reformer import Reformer, ReformerConfig

DEPTHS = (2, 8)
VOCAB = 256
FILE = Path(__file__).with_suffix(".json")
SHAPE = {"d_model": 256, "n_head": 4, "d_head": 64, "d_inner": 1024, "n_hashes": 2, "lsh_chunk_len": 64}
Step = Callable[[], None]


def ours(length: int, depth: int) -> Step:
    defaults = OmegaConf.to_container(OmegaConf.load(CONF / "model/reformer.yaml"))
    sizes = {"n_layer": depth, "tgt_len": length, "axial_shape": [64, length // 64], "n_buckets": length // 32}
    sizes |= {"dropout": 0.0, "dropatt": 0.0, "ff_chunk_len": 2048}
    config = ReformerConfig(**defaults | SHAPE | sizes)
    model = Reformer(config, VOCAB, Runtime(activation_checkpointing=True)).train()
    tokens = torch.randint(VOCAB, (1, length))
    batch = {"inputs": tokens, "targets": tokens, "lookback": torch.full((1, length), 10**6)}

    def step() -> None:
        model(batch, model.empty_memory(1), Noise.of_step(0, 0, range(1)))[0].mean().backward()

    return step


def theirs(length: int, depth: int) -> Step:
    from transformers import ReformerConfig as TheirConfig
    from transformers import ReformerModelWithLMHead

    config = TheirConfig(
        attn_layers=["local", "lsh"] * (depth // 2),
        hidden_size=SHAPE["d_model"],
        num_attention_heads=SHAPE["n_head"],
        attention_head_size=SHAPE["d_head"],
        feed_forward_size=SHAPE["d_inner"],
        chunk_size_feed_forward=2048,
        axial_pos_shape=[64, length // 64],
        axial_pos_embds_dim=[64, 192],
        max_position_embeddings=length,
        num_hashes=SHAPE["n_hashes"],
        num_buckets=length // 32,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
        vocab_size=VOCAB,
        is_decoder=True,
    )
    model = ReformerModelWithLMHead(config).train()
    tokens = torch.randint(VOCAB, (1, length))
    return lambda: model(tokens, labels=tokens).loss.backward()


class PlainLayer(nn.Module):
    """Causal attention and feed-forward, normalised first."""

    def __init__(self) -> None:
        super().__init__()
        d_model = SHAPE["d_model"]
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2))
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.inner = nn.Linear(d_model, SHAPE["d_inner"])
        self.outer = nn.Linear(SHAPE["d_inner"], d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, SHAPE["n_head"], -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.output(attended)
        return x + self.outer(self.inner(self.norms[1](x)).relu_())


def plain(length: int, depth: int) -> Step:
    embedding, positions = nn.Embedding(VOCAB, SHAPE["d_model"]), nn.Embedding(length, SHAPE["d_model"])
    layers = nn.ModuleList(PlainLayer() for _ in range(depth))
    head = nn.Linear(SHAPE["d_model"], VOCAB)
    tokens = torch.randint(VOCAB, (1, length))

    def step() -> None:
        x = embedding(tokens) + positions.weight
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        F.cross_entropy(head(x).flatten(0, 1), tokens.flatten()).backward()

    return step


def measure(build: Callable[[int, int], Step], length: int, depth: int, results: multiprocessing.Queue) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = build(length, depth)
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    results.put(((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, seconds))


def main() -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory goes back: the peak is that of what is in use
    context = multiprocessing.get_context("spawn")
    console = Console()
    table = Table("tokens", "layers", title="peak MiB (seconds of the one step)")
    sides = {"ours": ours, "transformers": theirs, "plain, checkpointed": plain}
    for name in sides:
        table.add_column(name, justify="right")
    rows = json.loads(FILE.read_text()) if FILE.exists() else {}
    for length in [int(given) for given in sys.argv[1:]] or [4096, 16384]:
        for depth in DEPTHS:
            row = rows[f"{length} x {depth}"] = {}
            for name, build in sides.items():
                results = context.Queue()
                process = context.Process(target=measure, args=(build, length, depth, results))
                process.start()
                mib, seconds = results.get()
                process.join()
                row[name] = {"peak_mib": mib, "seconds": seconds}
                console.print(f"{length:,} tokens, {depth} layers, {name}: {mib:,.0f} MiB, {seconds:.1f} s")
                with atomic_file(FILE) as temporary:
                    temporary.write_text(json.dumps(rows, indent=1) + "\n")
            cells = (f"{side['peak_mib']:,.0f} ({side['seconds']:.1f})" for side in row.values())
            table.add_row(f"{length:,}", str(depth), *cells)
    console.print(table)


if __name__ == "__main__":
    main()
