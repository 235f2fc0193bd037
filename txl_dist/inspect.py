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
    console = PlainConsole(soft_wrap=True)
    rows = {
        "checkpoint": summary["path"],
        **(describe_import(summary) if "imported" in summary else describe_training(summary)),
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


def describe_import(summary: dict[str, Any]) -> dict[str, str]:
    source, data = summary["imported"], summary["data"]
    return {
        "imported": f"from {source['from']}: {source['title']}",
        "data": f"{data['dir'] or 'none'}, vocabulary of {data['vocab_size']:,}",
        "versions": describe_versions(summary["written_by"]),
    }


def describe_training(summary: dict[str, Any]) -> dict[str, str]:
    data = summary["data"]
    since = f", since step {summary['lanes_since']:,}" if summary["lanes_since"] else ""
    valid = f", valid loss {summary['valid_loss']:.4f}" if summary["valid_loss"] is not None else ""
    lanes = f"{summary['num_lanes']:,} of {summary['tgt_len']} tokens per step{since}"
    return {
        "step": f"{summary['step']:,} of {summary['max_steps']:,}, {summary['tokens']:,} tokens read{valid}",
        "lanes": f"{lanes}, order {summary['order']}, seed {summary['seed']}",
        "data": f"{data['dir']}, vocabulary of {data['vocab_size']:,}, fingerprint {data['fingerprint'][:12]}",
        "written by": describe_split(summary["written_by"]),
        "versions": describe_versions(summary["written_by"]),
    }


def describe_split(written_by: dict[str, Any]) -> str:
    if "ranks" not in written_by:
        return "an earlier version of txl_dist"
    ranks, stages = written_by["ranks"], written_by["pipeline_stages"]
    pipeline = "no pipeline" if stages == 1 else f"{stages} pipeline stages"
    return (
        f"{ranks} ranks: data parallel {ranks // stages}, {pipeline}, ZeRO {written_by['zero_stage']}, "
        f"{written_by['gradient_accumulation']} micro-batches, {written_by['precision']}, "
        f"offload {written_by['offload']}"
    )


def describe_versions(written_by: dict[str, Any]) -> str:
    """Name the packages that wrote a checkpoint, with their versions."""
    packages = [name for name in ("txl_dist", "torch", "deepspeed") if written_by.get(name)]
    return ", ".join(f"{name} {written_by[name]}" for name in packages) or "not recorded"


def main() -> None:
    command("inspect", InspectJob, inspect)


if __name__ == "__main__":
    main()
