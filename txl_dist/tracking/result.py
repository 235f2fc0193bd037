"""What a start of a run ends with: the learning curve, and a short table of what came out and where it is."""

import math
import os
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rich.text import Text

from txl_dist.config.quoting import command_to_paste
from txl_dist.config.schema import TrainJob
from txl_dist.errors import describe_os_error, first_line
from txl_dist.tracking.console import PlainConsole, going_on_unheard
from txl_dist.tracking.curve import draw_curve
from txl_dist.tracking.metrics import last_line, read_metrics
from txl_dist.tracking.wandb_id import last_id

Row = tuple[str, str | Text]


def is_tested(job: TrainJob) -> bool:
    """Whether a run is over: its last step is done and the test split evaluated."""
    last = last_line(job.run.dir)
    return last is not None and "test/loss" in last and last["step"] == job.train.max_steps


def show_result(job: TrainJob, splits: Collection[str]) -> None:
    """Draw RUN_DIR/curve.png and print the table. splits: of the data."""
    run_dir, lines = job.run.dir, read_metrics(job.run.dir)
    rows = [*measured(lines)]
    if lines:
        step, tokens = lines[-1]["step"], lines[-1]["tokens"]
        rows.append(("steps", f"{step:,} of {job.train.max_steps:,}, {tokens:,} tokens"))
    else:
        rows.append(("steps", f"unknown: {run_dir}/metrics.jsonl holds none"))
    rows.append(("run directory", run_dir))
    rows.append(("learning curve", curve(run_dir, lines)))
    wandb_runs = sorted((Path(run_dir) / "wandb").glob("*run-*"), key=os.path.getmtime)
    rows += [("W&B run", str(each)) for each in wandb_runs[-1:]]
    if lines and step < job.train.max_steps:
        rows.append(("go on", "start the same command again, without train.stop_at"))
    split = next(name for name in ("valid", "test", "train") if name in splits)
    rows.append(("look further", command_to_paste("python -m txl_dist.evaluate", run=run_dir, split=split)))
    rows.append(("", command_to_paste("python -m txl_dist.generate", run=run_dir) + ' prompt="..."'))
    rows += [("", command) for command in wandb_sync(run_dir)]
    # Lines, not a rich table: that would cut or pad commands and paths that are longer than the screen is wide.
    texts = [Text(f"{label:<22}").append(value) for label, value in rows]
    with going_on_unheard():
        PlainConsole(soft_wrap=True).print("", *texts, "", sep="\n")


def measured(lines: list[dict[str, Any]]) -> Iterator[Row]:
    """Describe the last evaluation of each split, and the speed."""
    for split in ("valid", "test"):
        if evaluated := [line for line in lines if f"{split}/loss" in line]:
            keys = ("bits_per_byte", "loss", "perplexity")
            bits, loss, perplexity = (evaluated[-1].get(f"{split}/{key}", math.nan) for key in keys)
            more = f"  (loss {loss:.4f} nats a token, perplexity {perplexity:,.2f})"
            yield f"{split} bits per byte", Text.assemble((f"{bits:.3f}", "bold"), more)
    if speeds := [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]:
        yield "tokens per second", Text.assemble((f"{median(speeds):,.0f}", "bold"), "  (median of training)")


def curve(run_dir: str, lines: list[dict[str, Any]]) -> str:
    """Draw the learning curve; return its path, or why there is none."""
    try:
        return str(draw_curve(run_dir, lines))
    except OSError as error:
        return f"could not be drawn: {describe_os_error(error, run_dir)}"
    except Exception as error:  # matplotlib's, of its settings, its backend or fonts: the run has ended well
        return f"could not be drawn: {first_line(error)}"


def wandb_sync(run_dir: str) -> Iterator[str]:
    """Give the command that sends the offline parts of a run, one for each start; W&B sends them in their order."""
    folder, run_id = Path(run_dir) / "wandb", last_id(Path(run_dir))
    parts = list(folder.glob("offline-run-*"))
    own = [part for part in parts if (part / f"run-{run_id}.wandb").exists()]
    if own:
        # In a copy of a run directory there are those of the original, too.
        ending = "" if len(own) == len(parts) else f"-{shlex.quote(str(run_id))}*"
        yield f"wandb sync {shlex.quote(str(folder))}/offline-run-*{ending}"
