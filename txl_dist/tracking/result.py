"""What a start of a run ends with: the learning curve, and a short table of what came out and where it is."""

import os
from pathlib import Path
from statistics import median

from rich.console import Console

from txl_dist.config import TrainJob
from txl_dist.tracking.curve import draw_curve
from txl_dist.tracking.metrics import last_line, read_metrics


def is_tested(job: TrainJob) -> bool:
    """Whether a run is over: its last step is done and the test split evaluated."""
    last = last_line(job.run.dir)
    return last is not None and "test/loss" in last and last["step"] == job.train.max_steps


def show_result(job: TrainJob) -> None:
    """Draw RUN_DIR/curve.png and print the table."""
    run_dir, lines = job.run.dir, read_metrics(job.run.dir)
    step, rows = lines[-1]["step"], []
    for split in ("valid", "test"):
        if told := [line for line in lines if f"{split}/loss" in line]:
            bits, loss, perplexity = (told[-1][f"{split}/{key}"] for key in ("bits_per_byte", "loss", "perplexity"))
            more = f"loss {loss:.4f} nats a token, perplexity {perplexity:,.2f}"
            rows.append((f"{split} bits per byte", f"[bold]{bits:.3f}[/]  ({more})"))
    if speeds := [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]:
        rows.append(("tokens per second", f"[bold]{median(speeds):,.0f}[/]  (median of training)"))
    rows.append(("steps", f"{step:,} of {job.train.max_steps:,}, {lines[-1]['tokens']:,} tokens"))
    rows.append(("run directory", run_dir))
    try:
        rows.append(("learning curve", str(draw_curve(run_dir, lines))))
    except OSError as error:
        rows.append(("learning curve", f"could not be drawn: {error.filename or run_dir}: {error.strerror}"))
    wandb_runs = sorted((Path(run_dir) / "wandb").glob("*run-*"), key=os.path.getmtime)
    rows += [("W&B run", str(each)) for each in wandb_runs[-1:]]
    if step < job.train.max_steps:
        rows.append(("go on", "start the same command again, without train.stop_at"))
    rows.append(("look further", f"python -m txl_dist.evaluate run={run_dir} split=valid"))
    rows.append(("", f'python -m txl_dist.generate run={run_dir} prompt="..."'))
    rows += [("", f"wandb sync {each}") for each in wandb_runs[-1:] if each.name.startswith("offline")]
    # Lines, not a rich table: that would cut or pad commands and paths that are longer than the screen is wide.
    console = Console(soft_wrap=True, highlight=False)
    console.print("", *(f"{label:<22}{value}" for label, value in rows), "", sep="\n")
