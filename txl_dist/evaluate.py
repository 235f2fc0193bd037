"""The loss of runs' checkpoints on a split: `python -m txl_dist.evaluate run=RUN_DIR split=test`."""

import json
import time
from dataclasses import fields, replace
from typing import Any

import numpy as np
from rich.progress import track
from rich.table import Column, Table

from txl_dist.checkpoint.format import run_dirs
from txl_dist.cli import command
from txl_dist.config.checks import run_problems
from txl_dist.config.schema import EvaluateJob, LengthsConfig
from txl_dist.data.index import Index
from txl_dist.data.lanes import ResetMemory
from txl_dist.data.samples import SampleReader
from txl_dist.data.segments import whole_split
from txl_dist.data.text_size import size_of_text
from txl_dist.errors import ConfigError, UserError
from txl_dist.evaluation.likelihood import Score, losses_in_context, perplexity, score
from txl_dist.models.transformer_xl import TransformerXL
from txl_dist.runs.load import load_model, open_data
from txl_dist.tracking.console import PlainConsole

LENGTHS = [field.name for field in fields(LengthsConfig)]


def evaluate(job: EvaluateJob) -> None:
    """Print a table, or JSON, of the checkpoints' scores; of a run that cannot be evaluated its row says why."""
    runs = run_dirs(job.run)
    told = [score_of_run(job, runs[0])] if len(runs) == 1 else [row_of_run(job, run) for run in runs]
    if job.format == "json":
        print(json.dumps(told[0] if len(told) == 1 else told))
    elif len(told) == 1:
        show(told[0])
    else:
        compare(told)
    if any("error" in each for each in told):
        raise SystemExit(2)


def row_of_run(job: EvaluateJob, run: str) -> dict[str, Any]:
    """The score of one run of several, or `error`: why it has none."""
    try:
        if problems := list(run_problems(run, job.checkpoint)):
            raise ConfigError(problems)
        return score_of_run(job, run)
    except UserError as error:
        return {"run": run, "error": str(error)}


def score_of_run(job: EvaluateJob, run: str) -> dict[str, Any]:
    lengths = replace(job.model, mem_len=0, same_length=False) if job.sliding_window else job.model
    model, checkpoint = load_model(run, job.checkpoint, lengths, job.average)
    index, reset = open_data(run, job.data_dir, job.split, checkpoint), checkpoint.config["data"]["reset_memory"]
    whole = index.splits[job.split].tokens
    tokens = min(job.max_tokens or whole, whole)
    began = time.perf_counter()
    scored = (by_sliding_window if job.sliding_window else by_memory)(job, model, index, tokens, reset)
    seconds = time.perf_counter() - began
    size = size_of_text(index, job.split, tokens)
    config = model.config
    return {
        "run": run,
        "split": job.split,
        "tokens": tokens,
        **size._asdict(),
        "loss": scored.loss,
        "perplexity": perplexity(scored.loss),
        "bits_per_byte": scored.bits / size.bytes if size.bytes else None,
        "bits_per_character": scored.bits / size.characters if size.characters else None,
        "word_perplexity": perplexity(scored.nats / size.words) if size.words else None,
        "tokens_per_second": tokens / seconds,
        "step": checkpoint.step,
        **{key: getattr(config, key) for key in LENGTHS},
        "sliding_window": job.sliding_window,
    }


def by_memory(job: EvaluateJob, model: TransformerXL, index: Index, tokens: int, reset: ResetMemory) -> Score:
    """Segment by segment, with memory."""
    lanes = range(min(job.num_lanes, tokens))
    segments = whole_split(index, job.split, len(lanes), model.config.tgt_len, reset, lanes, tokens=tokens)
    device = next(model.parameters()).device
    return score(model, watched(segments, job.split, len(segments)), device, len(lanes))


def by_sliding_window(job: EvaluateJob, model: TransformerXL, index: Index, tokens: int, reset: ResetMemory) -> Score:
    """Token by token, each from a window of its own, as vanilla models are evaluated (Dai et al. 2019, section 3.1)."""
    stream = SampleReader(index, job.split).tokens(0, tokens).astype(np.int64)
    starts = index.splits[job.split].document_starts if reset == "document" else None
    steps, nats = np.array_split(np.arange(tokens), -(-tokens // job.num_lanes)), 0.0
    for positions in watched(steps, job.split, len(steps)):
        nats += losses_in_context(model, stream, positions, model.config.tgt_len, index.eos, starts).sum()
    return Score(nats, tokens)


def watched(steps: Any, what: str, total: int) -> Any:
    console = PlainConsole(stderr=True)
    return track(steps, what, total, console=console, transient=True, disable=not console.is_terminal)


def show(told: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for key, value in told.items():
        table.add_row(title(key), number(value))
    PlainConsole().print(table)


def compare(told: list[dict[str, Any]]) -> None:
    """Print one row per run, and below the table why a run has no numbers in its row."""
    keys = ["step", "tgt_len", "mem_len", "loss", "word_perplexity", "bits_per_character"]
    columns = Column("run", overflow="fold"), *(Column(title(key), justify="right") for key in keys)
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for each in told:
        table.add_row(each["run"], *(number(each.get(key, "-")) for key in keys))
    PlainConsole().print(table)
    for each in told:
        if "error" in each:
            print("", f"{each['run']}:", *(f"  {line}" for line in each["error"].splitlines()), sep="\n")


def title(key: str) -> str:
    return key if key in LENGTHS else key.replace("_", " ")


def number(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def main() -> None:
    command("evaluate", EvaluateJob, evaluate)


if __name__ == "__main__":
    main()
