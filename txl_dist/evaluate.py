"""The loss of a run's checkpoint on a whole split: `python -m txl_dist.evaluate run=RUN_DIR split=test`."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from txl_dist.check import model_fits_together
from txl_dist.cli import command
from txl_dist.config import EvaluateJob, GenerateJob, ModelConfig
from txl_dist.data.segments import whole_split
from txl_dist.data.shards import Index
from txl_dist.engine.checkpoint import Checkpoint, find_checkpoint
from txl_dist.engine.evaluation import score
from txl_dist.errors import ConfigError
from txl_dist.models.memory import Memory
from txl_dist.models.transformer_xl import TransformerXL


def evaluate(job: EvaluateJob) -> None:
    """Print a table, or one JSON object, of the checkpoint's score."""
    model, checkpoint = trained_model(job)
    index = open_data(job, checkpoint)
    split = index.splits[job.split]
    lanes = range(min(job.num_lanes, split.tokens))
    reset = checkpoint.config["data"]["reset_memory"]
    segments = whole_split(index, job.split, len(lanes), model.config.tgt_len, reset, lanes)
    weight = next(model.parameters())
    layers = range(model.config.n_layer)
    memory = Memory(layers, lanes, model.config.mem_len, model.config.d_model, weight.device, weight.dtype)
    progress = Console(stderr=True)
    began = time.perf_counter()
    scored = score(model, track(segments, job.split, len(segments), console=progress, transient=True), memory)
    seconds = time.perf_counter() - began
    told: dict[str, Any] = {"split": job.split, "tokens": scored.tokens, "bytes": split.bytes}
    told |= scored.metrics(split.bytes) | {"tokens_per_second": scored.tokens / seconds, "step": checkpoint.step}
    if job.format == "json":
        print(json.dumps(told))
    else:
        show(told, model.config)


def trained_model(job: EvaluateJob | GenerateJob) -> tuple[TransformerXL, Checkpoint]:
    """The model of a run's checkpoint, ready to be asked, with the lengths that the job gives.

    Raises:
        ConfigError: where those do not fit together.
    """
    checkpoint = find_checkpoint(job.run, job.checkpoint)
    trained = TypeAdapter(ModelConfig).validate_python(checkpoint.config["model"])
    config = job.model.of(trained)
    if problems := list(model_fits_together(config)):
        raise ConfigError(problems)
    model = TransformerXL(config, checkpoint.data["vocab_size"])
    checkpoint.load_weights(model)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), checkpoint


def open_data(job: EvaluateJob, checkpoint: Checkpoint) -> Index:
    """The data that the run was trained on.

    Raises:
        ConfigError: where they are gone, are others, or have no such split.
    """
    place = job.data_dir or checkpoint.config["data"]["dir"]
    index = Index.open(place)
    problems = []
    if index.fingerprint != checkpoint.data["fingerprint"]:
        problems.append(f"data_dir={place}: is not what the run {Path(job.run)} was trained on")
    if job.split not in index.splits:
        problems.append(f"split={job.split}: {place} has {', '.join(index.splits)}")
    if problems:
        raise ConfigError(problems)
    return index


def show(told: dict[str, Any], config: ModelConfig) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for key, value in told.items():
        table.add_row(
            key.replace("_", " "),
            f"{value:,}" if isinstance(value, int) else str(value) if isinstance(value, str) else f"{value:,.4f}",
        )
    lengths = f"tgt_len {config.tgt_len}, mem_len {config.mem_len}, clamp_len {config.clamp_len}"
    table.add_row("lengths", lengths + (", same_length" if config.same_length else ""))
    Console(highlight=False).print(table)


def main() -> None:
    command("evaluate", EvaluateJob, evaluate)


if __name__ == "__main__":
    main()
