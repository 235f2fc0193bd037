"""The loss of runs' checkpoints on a split: `python -m txl_dist.evaluate run=RUN_DIR split=test`."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from txl_dist.check import model_fits_together
from txl_dist.cli import command
from txl_dist.config import EvaluateJob, LengthsConfig, ModelConfig
from txl_dist.data.segments import whole_split
from txl_dist.data.shards import Index, SampleReader, sha256_of_file
from txl_dist.data.text_size import size_of_text
from txl_dist.engine.checkpoint import Checkpoint, find_checkpoint, run_dirs
from txl_dist.engine.evaluation import Score, losses_in_context, score
from txl_dist.errors import ConfigError
from txl_dist.models.transformer_xl import TransformerXL


def evaluate(job: EvaluateJob) -> None:
    """Print a table, or JSON, of the checkpoints' scores."""
    told = [score_of_run(job, run) for run in run_dirs(job.run)]
    if job.format == "json":
        print(json.dumps(told[0] if len(told) == 1 else told))
    elif len(told) == 1:
        show(told[0])
    else:
        compare(told)


def score_of_run(job: EvaluateJob, run: str) -> dict[str, Any]:
    lengths = replace(job.model, mem_len=0, same_length=False) if job.sliding_window else job.model
    model, checkpoint = trained_model(run, job.checkpoint, lengths, job.average)
    index = open_data(run, job.data_dir, job.split, checkpoint)
    began = time.perf_counter()
    scored = (by_sliding_window if job.sliding_window else by_memory)(job, model, index, checkpoint)
    seconds = time.perf_counter() - began
    size = size_of_text(index, job.split, scored.tokens)
    config = model.config
    return {
        "run": run,
        "split": job.split,
        "tokens": scored.tokens,
        **size._asdict(),
        **scored.metrics(size.bytes),
        "bits_per_character": scored.bits / size.characters,
        "word_perplexity": float(np.exp(min(scored.nats / size.words, 700.0))),
        "tokens_per_second": scored.tokens / seconds,
        "step": checkpoint.step,
        "lengths": f"tgt_len {config.tgt_len}, mem_len {config.mem_len}, clamp_len {config.clamp_len}"
        + (", same_length" if config.same_length else "")
        + (", sliding window" if job.sliding_window else ""),
    }


def by_memory(job: EvaluateJob, model: TransformerXL, index: Index, checkpoint: Checkpoint) -> Score:
    """Segment by segment, with memory."""
    tokens = min(job.max_tokens or index.splits[job.split].tokens, index.splits[job.split].tokens)
    lanes, reset = range(min(job.num_lanes, tokens)), checkpoint.config["data"]["reset_memory"]
    segments = whole_split(index, job.split, len(lanes), model.config.tgt_len, reset, lanes, tokens=tokens)
    return score(model, watched(segments, job.split, len(segments)), [model.empty_memory(len(lanes))])


def by_sliding_window(job: EvaluateJob, model: TransformerXL, index: Index, checkpoint: Checkpoint) -> Score:
    """Token by token, each from a window of its own, as vanilla models are evaluated (Dai et al. 2019, section 3.1)."""
    tokens = min(job.max_tokens or index.splits[job.split].tokens, index.splits[job.split].tokens)
    stream = SampleReader(index, job.split).tokens(0, tokens).astype(np.int64)
    starts = (
        index.splits[job.split].document_starts if checkpoint.config["data"]["reset_memory"] == "document" else None
    )
    context, nats = model.config.tgt_len, 0.0
    for positions in watched(np.array_split(np.arange(tokens), -(-tokens // job.num_lanes)), job.split, None):
        nats += losses_in_context(model, stream, positions, context, index.eos, starts).sum()
    return Score(nats, tokens)


def watched(steps: Any, what: str, total: int | None) -> Any:
    return track(steps, what, total, console=Console(stderr=True), transient=True)


def trained_model(
    run: str, step: int | None, lengths: LengthsConfig, average: bool = False
) -> tuple[TransformerXL, Checkpoint]:
    """The model of a run's checkpoint, ready to be asked, with the lengths that are given.

    Raises:
        ConfigError: where those do not fit together, or an average is wanted that was not kept.
    """
    checkpoint = find_checkpoint(run, step)
    config = lengths.of(TypeAdapter(ModelConfig).validate_python(checkpoint.config["model"]))
    problems = list(model_fits_together(config))
    if average and checkpoint.config.get("optimizer", {}).get("average_from") is None:
        problems.append(f"average=true: the run {run} has kept none; train with optimizer.average_from=STEP")
    if problems:
        raise ConfigError(problems)
    model = TransformerXL(config, checkpoint.data["vocab_size"])
    checkpoint.load_weights(model, average)
    model.cache()
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), checkpoint


def open_data(run: str, data_dir: str | None, split: str, checkpoint: Checkpoint) -> Index:
    """The data that a run was trained on; of an imported model any that have its tokenizer.

    Raises:
        ConfigError: where they are gone, are others, or have no such split.
    """
    imported, tokenizer = "imported" in checkpoint.state, Path(run) / "tokenizer"
    place = data_dir or checkpoint.config["data"]["dir"]
    if place is None:
        raise ConfigError(
            [f"data_dir: is missing; give data prepared with the tokenizer of the imported model, {tokenizer}"]
        )
    index = Index.open(place)
    problems = []
    if imported:
        if index.tokenizer_files != {path.name: sha256_of_file(path) for path in tokenizer.iterdir()}:
            problems.append(f"data_dir={place}: its tokenizer is another than that of the imported model, {tokenizer}")
    elif index.fingerprint != checkpoint.data["fingerprint"]:
        problems.append(f"data_dir={place}: is not what the run {Path(run)} was trained on")
    if split not in index.splits:
        problems.append(f"split={split}: {place} has {', '.join(index.splits)}")
    if problems:
        raise ConfigError(problems)
    return index


def show(told: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for key, value in told.items():
        table.add_row(key.replace("_", " "), number(value))
    Console(highlight=False).print(table)


def compare(told: list[dict[str, Any]]) -> None:
    """One row a run."""
    keys = [
        "run",
        "step",
        "loss",
        "perplexity",
        "word_perplexity",
        "bits_per_character",
        "tokens_per_second",
        "lengths",
    ]
    table = Table(*(key.replace("_", " ") for key in keys), box=None, padding=(0, 2, 0, 0))
    for each in told:
        table.add_row(*(number(each[key]) for key in keys))
    Console(highlight=False).print(table)


def number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def main() -> None:
    command("evaluate", EvaluateJob, evaluate)


if __name__ == "__main__":
    main()
