"""Print what a checkpoint holds: txl-inspect run=RUN_DIR."""

import json
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from txl_dist.cli import command
from txl_dist.config.schema import InspectJob
from txl_dist.tracking.console import PlainConsole


def inspect(job: InspectJob) -> None:
    """Print a table, or one JSON object.

    Raises:
        UserError: where the checkpoint of the given step is damaged. File sizes are always compared; contents only
            with `verify`.
    """
    from txl_dist.checkpoint.format import find_checkpoint, steps  # with torch: not for --help
    from txl_dist.runs.summary import summarize

    checkpoint = find_checkpoint(job.run, job.checkpoint, contents=job.verify)
    other_steps = [step for step in steps(job.run) if step != checkpoint.step]
    summary = summarize(checkpoint) | {"other_steps": other_steps}
    if job.format == "json":
        print(json.dumps(summary))
    else:
        show(summary, job.verify)


def show(summary: dict[str, Any], verified: bool) -> None:
    """Print where a checkpoint comes from, and a table of what it holds."""
    from txl_dist.runs.summary import describe

    console = PlainConsole(soft_wrap=True)
    rows = {
        "checkpoint": summary["path"],
        **describe(summary),
        "files": "sizes and SHA-256 are right" if verified else "sizes are right; verify=true compares SHA-256, too",
        "also there": ", ".join(f"step {step:,}" for step in summary["other_steps"]) or "no other checkpoint",
    }
    console.print(*(f"{label:<12}{value}" for label, value in rows.items()), "", sep="\n")
    table = Table("", "tensors", "numbers", "files", "bytes", box=None, padding=(0, 3, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    optimizer = f"optimizer ({summary.get('optimizer')})"
    labels = {"weights": "weights", "optimizer": optimizer, "memory": "memory (layer x lane)"}
    for kind, inventory in summary["holds"].items():
        counts = [f"{inventory[key]:,}" for key in ("tensors", "numbers", "files")]
        table.add_row(labels[kind], *counts, decimal(inventory["bytes"]))
    console.print(table)


def main() -> None:
    command("inspect", InspectJob, inspect)


if __name__ == "__main__":
    main()
