"""Print the loss of runs' checkpoints on a split: txl-evaluate run=RUN_DIR split=test."""

import json
from typing import Any

from rich.table import Column, Table

from txl_dist.cli import command
from txl_dist.config.schema import EvaluateJob
from txl_dist.tracking.console import PlainConsole

PHRASES = ["bits_per_byte", "bits_per_character", "bits_per_dimension", "word_perplexity"]
PHRASES += ["tokens_per_second", "sliding_window", "examples_per_second", "exact_match", "answer_f1", "best_threshold"]
PHRASES += [f"{part}_{metric}" for part in ("has_answer", "no_answer") for metric in ("exact_match", "f1")]
PHRASES += ["best_exact_match", "best_answer_f1"]
COMPARED = ["step", "tgt_len", "mem_len", "loss"]
OF_TEXT = ["word_perplexity", "bits_per_character"]
OF_IDS = ["bits_per_dimension"]
OF_TASKS = ["accuracy", "f1", "matthews", "pearson", "spearman", "exact_match", "answer_f1"]


def evaluate(job: EvaluateJob) -> None:
    """Print a table, or JSON, of the checkpoints' scores; the row of a run that cannot be evaluated says why.

    Raises:
        UserError: where there is only one run, and it cannot be evaluated.
        SystemExit: with code 2, where one of several cannot be.
    """
    from txl_dist.checkpoint.format import run_dirs  # with torch: not for --help
    from txl_dist.evaluation.splits import evaluate_run, evaluate_run_or_error

    runs = run_dirs(job.run)
    several = len(runs) > 1
    scores = [evaluate_run_or_error(job, run) if several else evaluate_run(job, run) for run in runs]
    if job.format == "json":
        print(json.dumps(scores if several else scores[0]))
    elif several:
        compare(scores)
    else:
        show(scores[0])
    if any("error" in score for score in scores):
        raise SystemExit(2)


def show(score: dict[str, Any]) -> None:
    """Print all numbers of one run, one per line."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for key, value in score.items():
        if key not in ("labels", "confusions"):
            table.add_row(title(key), number(value))
    console = PlainConsole()
    console.print(table)
    if "confusions" in score:
        import numpy as np  # not for --help

        from txl_dist.objectives.example_metrics import confusion_table

        console.print("", confusion_table(np.array(score["confusions"]), score["labels"]))


def compare(scores: list[dict[str, Any]]) -> None:
    """Print one row per run, and below the table why a run has no numbers in its row."""
    are_ids = any(key in score for score in scores for key in OF_IDS)
    of_tasks = [key for key in OF_TASKS if any(key in score for score in scores)]
    are_text = any(key in score for score in scores for key in OF_TEXT) or not (are_ids or of_tasks)
    compared = COMPARED + OF_TEXT * are_text + OF_IDS * are_ids + of_tasks
    columns = [Column(title(key), justify="right") for key in compared]
    table = Table(Column("run", overflow="fold"), *columns, box=None, padding=(0, 2, 0, 0))
    for score in scores:
        table.add_row(score["run"], *(number(score.get(key, "-")) for key in compared))
    PlainConsole().print(table)
    for score in scores:
        if "error" in score:
            print("", f"{score['run']}:", *(f"  {line}" for line in score["error"].splitlines()), sep="\n")


def title(key: str) -> str:
    """Return the label of a number; keys of the config keep their names."""
    return key.replace("_", " ") if key in PHRASES else key


def number(value: Any) -> str:
    """Format a number for a table; None is a size that is not known."""
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if type(value) is int else str(value)


def main() -> None:
    command("evaluate", EvaluateJob, evaluate)


if __name__ == "__main__":
    main()
