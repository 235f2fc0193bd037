"""Compare how far back context helps models: txl-recl 'run=runs/*'."""

import json

from rich.progress import Progress
from rich.table import Table

from txl_dist.cli import command
from txl_dist.config.schema import ReclJob
from txl_dist.tracking.console import PlainConsole


def recl(job: ReclJob) -> None:
    """Print the relative effective context length of some runs, as table 8 of Dai et al. (2019) or one JSON object.

    Raises:
        ConfigError: where the runs were not all trained on the same data.
    """
    import numpy as np

    from txl_dist.checkpoint.format import run_dirs  # with torch: not for --help
    from txl_dist.evaluation.context import RATIOS, check_data, context_losses, effective_lengths

    runs = run_dirs(job.run)
    check_data(job, runs)
    contexts = range(job.step, job.max_context + 1, job.step)
    console = PlainConsole(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=len(runs) * sum(contexts))
        losses = [context_losses(job, run, contexts, lambda done: progress.advance(task, done)) for run in runs]
    lengths = effective_lengths(np.array(losses), contexts)
    table = {run: dict(zip(RATIOS, row, strict=True)) for run, row in zip(runs, lengths, strict=True)}
    if job.format == "json":
        print(json.dumps(table))
    else:
        show(table)


def show(table: dict[str, dict[float, int]]) -> None:
    """Print one row per run, one column per share of the hardest tokens."""
    ratios = next(iter(table.values()))
    rows = Table("run", *(f"r = {ratio}" for ratio in ratios), box=None, padding=(0, 3, 0, 0))
    for run, lengths in table.items():
        rows.add_row(run, *map(str, lengths.values()))
    PlainConsole().print(rows)


def main() -> None:
    command("recl", ReclJob, recl)


if __name__ == "__main__":
    main()
