"""The loss of a run's checkpoint on a whole split, with memory or by a sliding window."""

import time
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from rich.progress import track

from txl_dist.checkpoint.format import find_checkpoint
from txl_dist.config.run_checks import run_problems
from txl_dist.config.schema import EvaluateJob, TaskConfig
from txl_dist.data.examples import ExampleSource
from txl_dist.data.index import Index
from txl_dist.data.lanes import ResetMemory
from txl_dist.data.samples import SampleReader
from txl_dist.data.segments import whole_split
from txl_dist.data.text_size import TextSize, number_of_dimensions, size_of_text
from txl_dist.errors import ConfigError, UserError
from txl_dist.evaluation.likelihood import losses_in_context, score
from txl_dist.evaluation.predicting import score_examples
from txl_dist.models.base import LanguageModel
from txl_dist.objectives.base import Score, perplexity
from txl_dist.runs.load import load_model, load_task, objective_of, open_data
from txl_dist.tracking.console import PlainConsole

Step = TypeVar("Step")


def evaluate_run(job: EvaluateJob, run: str) -> dict[str, Any]:
    """Score one run's checkpoint: its loss in nats per token, what follows from it, the sizes of the text, the lengths.

    Of a run that has learnt a task the metrics are those of `evaluate_task`.

    Raises:
        UserError: where the checkpoint or its data cannot be read.
        ConfigError: where the model cannot be read so, or the data are not those of the run.
    """
    if isinstance(objective_of(find_checkpoint(run, job.checkpoint)), TaskConfig):
        return evaluate_task(job, run)
    model, checkpoint = load_model(run, job.checkpoint, job.model, job.average)
    config = model.config.without_memory() if job.sliding_window else model.config
    if config is None:
        raise ConfigError([f"sliding_window=true: {model.config.name} cannot read a segment alone; leave it out"])
    index = open_data(run, checkpoint, job.split, job.data_dir)
    tokens = min(job.max_tokens or index.splits[job.split].tokens, index.splits[job.split].tokens)
    score_split = score_by_sliding_window if job.sliding_window else score_with_memory
    start = time.perf_counter()
    with model.reading_as(config):
        result = score_split(job, model, index, tokens, checkpoint.config["data"]["reset_memory"])
    seconds = time.perf_counter() - start
    size = size_of_text(index, job.split, tokens)
    dimensions = number_of_dimensions(index, job.split, tokens)
    return {
        "run": run,
        "split": job.split,
        "tokens": tokens,
        **(size._asdict() if dimensions is None else {"dimensions": dimensions}),
        "loss": result.loss,
        "perplexity": perplexity(result.loss),
        **(per_text(result, size) if dimensions is None else {"bits_per_dimension": result.bits / dimensions}),
        "tokens_per_second": tokens / seconds,
        "step": checkpoint.step,
        **{key: getattr(config, key) for key in config.read_otherwise()},
        "sliding_window": job.sliding_window,
        **({"note": config.note} if config.note else {}),
    }


def evaluate_task(job: EvaluateJob, run: str) -> dict[str, Any]:
    """Measure what one run's checkpoint says of the examples of a split, and of classes which it takes for which.

    Raises:
        UserError: where the checkpoint or its data cannot be read.
        ConfigError: where the model cannot be read so, or the data are not those of the run.
    """
    given = [key for key in ("max_tokens", "sliding_window") if getattr(job, key)]
    if given:
        raise ConfigError([f"{key}: is for models that predict text; {run} has learnt a task" for key in given])
    model, objective, checkpoint = load_task(run, job.checkpoint, job.model, job.average)
    index = open_data(run, checkpoint, job.split, job.data_dir)
    source = ExampleSource.of_split(index, job.split)
    start = time.perf_counter()
    score = score_examples(model, objective, source, job.num_lanes, partial(with_progress, title=job.split))
    seconds = time.perf_counter() - start
    return {
        "run": run,
        "split": job.split,
        "examples": len(source),
        **objective.metrics(score, index, job.split),
        **objective.confusions(list(score.predictions), source),
        "examples_per_second": len(source) / seconds,
        "step": checkpoint.step,
        **{key: getattr(model.config, key) for key in model.config.read_otherwise()},
    }


def per_text(result: Score, size: TextSize) -> dict[str, float | None]:
    """Divide a loss by the sizes of the text; None for a size that is not known."""
    return {
        "bits_per_byte": result.bits / size.bytes if size.bytes else None,
        "bits_per_character": result.bits / size.characters if size.characters else None,
        "word_perplexity": perplexity(result.nats / size.words) if size.words else None,
    }


def evaluate_run_or_error(job: EvaluateJob, run: str) -> dict[str, Any]:
    """Score one run of several; where that fails, return the reason under `error`."""
    try:
        if problems := list(run_problems(run, job.checkpoint)):
            raise ConfigError(problems)
        return evaluate_run(job, run)
    except UserError as error:
        return {"run": run, "error": str(error)}


def score_with_memory(job: EvaluateJob, model: LanguageModel, index: Index, tokens: int, reset: ResetMemory) -> Score:
    """Score the first tokens of a split segment by segment, each lane with its memory."""
    lanes = range(min(job.num_lanes, tokens))
    segments = whole_split(index, job.split, len(lanes), model.config.tgt_len, reset, lanes, tokens=tokens)
    device = next(model.parameters()).device
    return score(model, with_progress(segments, len(segments), job.split), device, len(lanes))


def score_by_sliding_window(
    job: EvaluateJob, model: LanguageModel, index: Index, tokens: int, reset: ResetMemory
) -> Score:
    """Score the first tokens of a split one by one, each from the tgt_len tokens before it.

    Vanilla Transformers are evaluated this way (Dai et al. 2019, section 3.1).
    """
    stream = SampleReader(index, job.split).tokens(0, tokens).astype(np.int64)
    starts = index.splits[job.split].document_starts
    batches = np.array_split(np.arange(tokens), -(-tokens // job.num_lanes))
    nats = 0.0
    for positions in with_progress(batches, len(batches), job.split):
        nats += losses_in_context(model, stream, positions, model.config.tgt_len, index.eos, starts, reset).sum()
    return Score(nats, tokens)


def with_progress(steps: Iterable[Step], total: int, title: str) -> Iterable[Step]:
    """Show a progress bar on standard error where that is a terminal."""
    console = PlainConsole(stderr=True)
    return track(steps, title, total, console=console, transient=True, disable=not console.is_terminal)
