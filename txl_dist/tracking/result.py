"""The end of a start of a run: the learning curve, and a short table of the results and where to see them."""

import math
import os
import shlex
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from rich.text import Text

from txl_dist.config.quoting import command_to_paste
from txl_dist.config.schema import TaskConfig, TrainJob
from txl_dist.distributed.logs import output_optional
from txl_dist.errors import describe_os_error, first_line
from txl_dist.tracking.console import PlainConsole
from txl_dist.tracking.curve import draw_curve
from txl_dist.tracking.dashboard.dashboard import FILE
from txl_dist.tracking.metrics import read_metrics
from txl_dist.tracking.services.wandb_id import last_id

Row = tuple[str, str | Text]

TASK_METRICS = {"accuracy", "pearson", "exact_match"}  # the first of each task
LEET = (0, 31)  # the first release of W&B with its viewer for a terminal


def show_result(job: TrainJob, splits: Collection[str]) -> None:
    """Draw RUN_DIR/curve.png and print the table of results.

    Args:
        splits: names of the splits that the data have.
    """
    run_dir = job.run.dir
    lines = read_metrics(run_dir)
    rows = [*result_rows(lines)]
    if lines:
        step = lines[-1]["step"]
        tokens = lines[-1]["tokens"]
        rows.append(("steps", f"{step:,} of {job.train.max_steps:,}, {tokens:,} tokens"))
    else:
        rows.append(("steps", f"unknown: {run_dir}/metrics.jsonl holds none"))
    rows.append(("run directory", run_dir))
    rows.append(("learning curve", curve_or_reason(run_dir, lines)))
    dashboard = Path(run_dir) / FILE
    if dashboard.is_file():
        rows.append(("dashboard", str(dashboard)))
    wandb_runs = sorted((Path(run_dir) / "wandb").glob("*run-*"), key=os.path.getmtime)
    if wandb_runs:
        rows.append(("W&B run", str(wandb_runs[-1])))
    if lines and step < job.train.max_steps:
        rows.append(("continue", "start the same command again, without train.stop_at"))
    split = next(name for name in ("valid", "test", "train") if name in splits)
    rows.append(("look further", command_to_paste("python -m txl_dist.evaluate", run=run_dir, split=split)))
    if isinstance(job.objective, TaskConfig):
        rows.append(("", command_to_paste("python -m txl_dist.predict", run=run_dir) + " file=..."))
    else:
        rows.append(("", command_to_paste("python -m txl_dist.look", run=run_dir) + ' text="..."'))
        rows.append(("", command_to_paste("python -m txl_dist.generate", run=run_dir) + ' prompt="..."'))
    rows += [("", command) for command in wandb_commands(run_dir)]
    # Lines, not a rich table: that would cut or pad commands and paths that are longer than the screen is wide.
    width = max(22, *(len(label) + 2 for label, _ in rows))
    texts = [Text(label.ljust(width)).append(value) for label, value in rows]
    with output_optional():
        PlainConsole(soft_wrap=True).print("", *texts, "", sep="\n")


def result_rows(lines: list[dict[str, Any]]) -> Iterator[Row]:
    """Describe the last evaluation of each split, and the speed of training."""
    for split in ("valid", "test"):
        evaluated = [line for line in lines if f"{split}/loss" in line]
        task_rows = list(rows_of_task(split, evaluated[-1])) if evaluated else []
        if task_rows:
            yield from task_rows
        elif evaluated:
            loss, perplexity = (evaluated[-1].get(f"{split}/{key}", math.nan) for key in ("loss", "perplexity"))
            unit = next((unit for unit in ("byte", "dimension") if f"{split}/bits_per_{unit}" in evaluated[-1]), None)
            if unit:
                more = f"  (loss {loss:.4f} nats per token, perplexity {perplexity:,.2f})"
                bits = evaluated[-1][f"{split}/bits_per_{unit}"]
                yield f"{split} bits per {unit}", Text.assemble((f"{bits:.3f}", "bold"), more)
            else:  # of an objective that does not predict the text, token by token
                more = f"  (nats per predicted token, perplexity {perplexity:,.2f})"
                yield f"{split} loss", Text.assemble((f"{loss:.4f}", "bold"), more)
    speeds = [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]
    if speeds:
        yield "tokens per second", Text.assemble((f"{median(speeds):,.0f}", "bold"), "  (median of training)")


def rows_of_task(split: str, line: dict[str, Any]) -> Iterator[Row]:
    """Describe what an evaluation has measured of a task; nothing where there is none."""
    keys = {key.partition("/")[2]: value for key, value in line.items() if key.startswith(f"{split}/")}
    for key in TASK_METRICS & keys.keys():
        more = ", ".join(f"{other.replace('_', ' ')} {value:.4f}" for other, value in keys.items() if other != key)
        yield f"{split} {key.replace('_', ' ')}", Text.assemble((f"{keys[key]:.4f}", "bold"), f"  ({more})")


def curve_or_reason(run_dir: str, lines: list[dict[str, Any]]) -> str:
    """Draw the learning curve; return its path, or why it could not be drawn."""
    try:
        return str(draw_curve(run_dir, lines))
    except OSError as error:
        return f"could not be drawn: {describe_os_error(error, run_dir)}"
    except Exception as error:  # matplotlib's, about its settings, backend or fonts: the run itself succeeded
        return f"could not be drawn: {first_line(error)}"


def wandb_commands(run_dir: str) -> Iterator[str]:
    """Yield the commands, if any, for what W&B has in a run directory.

    One shows it in a terminal, without a network (W&B's LEET). The other sends the offline parts of the run, one for
    each start, to W&B in their order.
    """
    folder = Path(run_dir) / "wandb"
    run_id = last_id(Path(run_dir))
    if run_id is not None and has_viewer():
        yield f"wandb leet {shlex.quote(str(folder))}"
    parts = list(folder.glob("offline-run-*"))
    own = [part for part in parts if (part / f"run-{run_id}.wandb").exists()]
    if own:
        # A copy of a run directory contains the parts of the original, too.
        ending = "" if len(own) == len(parts) else f"-{shlex.quote(str(run_id))}*"
        yield f"wandb sync {shlex.quote(str(folder))}/offline-run-*{ending}"


def has_viewer() -> bool:
    """Return whether the installed W&B has the command `leet`; releases before 0.31 have it as a trial, or not at all.

    The package is not imported for that, because it is large and may be broken.
    """
    try:
        major, minor = version("wandb").split(".")[:2]
        return (int(major), int(minor)) >= LEET
    except (PackageNotFoundError, ValueError):
        return False
