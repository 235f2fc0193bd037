"""Relative effective context length (Dai et al. 2019, section 4.4 and appendix C): how far back context helps.

Models are compared with each other: a longer context counts where it makes a loss smaller than the best that any of
them reaches with the shorter one. RECL is the shortest context beyond which a longer one gains less than 1 %.

    b(c, t)   = min_i l_i(c, t)                            the best loss of token t with context c
    f_i(c, c') = mean of min(b(c, t), l_i(c', t))          over the hardest share r of the tokens, by b(c, t)
    g_i(c, c') = 1 - exp(f_i(c, c')) / exp(f_i(c, c))      the gain of model i from c to c' = c + step
"""

import json
from collections.abc import Callable

import numpy as np
from rich.progress import Progress
from rich.table import Table

from txl_dist.checkpoint.format import find_checkpoint, run_dirs
from txl_dist.cli import command
from txl_dist.config.schema import LengthsConfig, ReclJob
from txl_dist.data.samples import SampleReader
from txl_dist.errors import ConfigError, UserError
from txl_dist.evaluation.likelihood import losses_in_context
from txl_dist.runs.load import load_model, open_data
from txl_dist.tracking.console import PlainConsole

RATIOS = (0.1, 0.5, 1.0)
LEAST_GAIN = 0.01


def recl(job: ReclJob) -> None:
    """Print the paper's table 8 for some runs, or one JSON object.

    Raises:
        ConfigError: where the runs are not all of the same data.
    """
    runs = run_dirs(job.run)
    check_data(job, runs)
    contexts = range(job.step, job.max_context + 1, job.step)
    console = PlainConsole(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=len(runs) * sum(contexts))
        losses = [losses_of_run(job, run, contexts, lambda done: progress.advance(task, done)) for run in runs]
    table = dict(zip(runs, table_8(np.array(losses), contexts), strict=True))
    if job.format == "json":
        print(json.dumps({run: dict(zip(map(str, RATIOS), row, strict=True)) for run, row in table.items()}))
    else:
        show(table)


def check_data(job: ReclJob, runs: list[str]) -> None:
    """Open the data of all runs before anything is computed.

    Raises:
        ConfigError: with every run whose data cannot be read, or are not those of the first one.
    """
    problems: list[str] = []
    fingerprints: dict[str, str] = {}
    for run in runs:
        try:
            index = open_data(run, job.data_dir, job.split, find_checkpoint(run, None))
        except UserError as error:
            problems += [f"run={run}: {line}" for line in str(error).splitlines()]
            continue
        fingerprints[run] = index.fingerprint
        tokens = index.splits[job.split].tokens
        if job.max_context > tokens:
            problems.append(f"max_context={job.max_context}: the split {job.split} of {run} has {tokens:,} tokens only")
    first = next(iter(fingerprints), None)
    problems += [
        f"run={run}: was trained on other data than {first}"
        for run, fingerprint in fingerprints.items()
        if first is not None and fingerprint != fingerprints[first]
    ]
    if problems:
        raise ConfigError(problems)


def losses_of_run(job: ReclJob, run: str, contexts: range, advance: Callable[[int], None]) -> list[np.ndarray]:
    """Of the positions looked at, in nats: [contexts][positions]."""
    model, checkpoint = load_model(run, None, LengthsConfig(None, None, None, None))
    index = open_data(run, job.data_dir, job.split, checkpoint)
    split = index.splits[job.split]
    stream = SampleReader(index, job.split).tokens(0, split.tokens).astype(np.int64)
    positions = np.linspace(0, split.tokens - 1, min(job.positions, split.tokens)).astype(np.int64)
    starts = split.document_starts if checkpoint.config["data"]["reset_memory"] == "document" else None
    parts, losses = np.array_split(positions, -(-len(positions) // job.num_lanes)), []
    for context in contexts:
        found = [losses_in_context(model, stream, part, context, index.eos, starts) for part in parts]
        losses.append(np.concatenate(found))
        advance(context)
    return losses


def table_8(losses: np.ndarray, contexts: range) -> list[list[int]]:
    """RECL of each model at each of RATIOS.

    Args:
        losses: [models, contexts, positions].
    """
    return [[effective_length(losses, model, contexts, ratio) for ratio in RATIOS] for model in range(len(losses))]


def effective_length(losses: np.ndarray, model: int, contexts: range, ratio: float) -> int:
    """The first context whose next one gains this model less than LEAST_GAIN; the last, where all gain more."""
    for i in range(len(contexts) - 1):
        baseline = losses[:, i].min(axis=0)
        hardest = np.argsort(-baseline, kind="stable")[: max(1, round(ratio * len(baseline)))]
        short, long = (np.minimum(baseline, losses[model, at])[hardest].mean() for at in (i, i + 1))
        if 1 - np.exp(long - short) < LEAST_GAIN:
            return contexts[i]
    return contexts[-1]


def show(table: dict[str, list[int]]) -> None:
    rows = Table("run", *(f"r = {ratio}" for ratio in RATIOS), box=None, padding=(0, 3, 0, 0))
    for run, lengths in table.items():
        rows.add_row(run, *map(str, lengths))
    PlainConsole().print(rows)


def main() -> None:
    command("recl", ReclJob, recl)


if __name__ == "__main__":
    main()
