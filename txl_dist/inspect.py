"""What a checkpoint holds: `python -m txl_dist.inspect run=RUN_DIR`."""

import json
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from txl_dist.checkpoint.format import Checkpoint, find_checkpoint, steps
from txl_dist.cli import command
from txl_dist.config.schema import InspectJob
from txl_dist.tracking.console import PlainConsole


def inspect(job: InspectJob) -> None:
    """Print a table, or one JSON object.

    Raises:
        UserError: where the checkpoint of the step asked for is damaged: of sizes always, of contents with `verify`.
    """
    checkpoint = find_checkpoint(job.run, job.checkpoint, contents=job.verify)
    told = facts(checkpoint) | {"other_steps": [step for step in steps(job.run) if step != checkpoint.step]}
    if job.format == "json":
        print(json.dumps(told))
    else:
        show(told, job.verify)


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    state, config = checkpoint.state, checkpoint.config
    data = {"dir": config["data"]["dir"]} | checkpoint.data
    kinds = ("weights",) if "imported" in state else ("weights", "optimizer", "memory")
    holds = {kind: checkpoint.contents(kind)._asdict() for kind in kinds}
    if "imported" in state:
        return {
            "path": str(checkpoint.path),
            "step": checkpoint.step,
            "imported": state["imported"],
            "written_by": state.get("written_by") or {},
            "data": data,
            "holds": holds,
        }
    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "max_steps": config["train"]["max_steps"],
        "tokens": state["tokens"],
        "valid_loss": checkpoint.valid_loss,
        "num_lanes": config["data"]["num_lanes"],
        "tgt_len": config["model"]["tgt_len"],
        "lanes_since": state.get("origin", {"step": 0})["step"],
        "seed": config["run"]["seed"],
        "order": config["data"]["order"],
        "data": data,
        "written_by": {"pipeline_stages": 1} | config["engine"] | (state.get("written_by") or {}),
        "optimizer": config["optimizer"]["name"],
        "holds": holds,
    }


def show(told: dict[str, Any], verified: bool) -> None:
    console = PlainConsole(soft_wrap=True)
    rows = {
        "checkpoint": told["path"],
        **(origin(told) if "imported" in told else course(told)),
        "files": "sizes and sha256 are right" if verified else "sizes are right; verify=true reads all of them",
        "also there": ", ".join(f"step {step:,}" for step in told["other_steps"]) or "no other checkpoint",
    }
    console.print(*(f"{label:<12}{value}" for label, value in rows.items()), "", sep="\n")
    table = Table("", "tensors", "numbers", "files", "bytes", box=None, padding=(0, 3, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    names = {"weights": "weights", "memory": "memory (layer x lane)"}
    names["optimizer"] = f"optimizer ({told.get('optimizer')})"
    for kind, held in told["holds"].items():
        counts = [f"{held[key]:,}" for key in ("tensors", "numbers", "files")]
        table.add_row(names[kind], *counts, decimal(held["bytes"]))
    console.print(table)


def origin(told: dict[str, Any]) -> dict[str, str]:
    """Of an imported model."""
    whence = told["imported"]
    return {
        "imported": f"from {whence['from']}: {whence['title']}",
        "data": f"{told['data']['dir'] or 'none'}, vocabulary of {told['data']['vocab_size']:,}",
        "versions": versions(told["written_by"]),
    }


def course(told: dict[str, Any]) -> dict[str, str]:
    """Of a run that was trained here."""
    since = f", since step {told['lanes_since']:,}" if told["lanes_since"] else ""
    data, valid = told["data"], f", valid loss {told['valid_loss']:.4f}" if told["valid_loss"] is not None else ""
    return {
        "step": f"{told['step']:,} of {told['max_steps']:,}, {told['tokens']:,} tokens read{valid}",
        "lanes": f"{told['num_lanes']:,} of {told['tgt_len']} tokens a step{since}, order {told['order']}, "
        f"seed {told['seed']}",
        "data": f"{data['dir']}, vocabulary of {data['vocab_size']:,}, fingerprint {data['fingerprint'][:12]}",
        "written by": split(told["written_by"]),
        "versions": versions(told["written_by"]),
    }


def split(by: dict[str, Any]) -> str:
    if "ranks" not in by:
        return "an earlier version of txl_dist"
    stages = by["pipeline_stages"]
    return (
        f"{by['ranks']} ranks: data parallel {by['ranks'] // stages}, "
        f"{'no pipeline' if stages == 1 else f'{stages} pipeline stages'}, ZeRO {by['zero_stage']}, "
        f"{by['gradient_accumulation']} micro-batches, {by['precision']}, offload {by['offload']}"
    )


def versions(by: dict[str, Any]) -> str:
    """Name the packages that wrote a checkpoint, with their versions."""
    packages = [name for name in ("txl_dist", "torch", "deepspeed") if by.get(name)]
    return ", ".join(f"{name} {by[name]}" for name in packages) or "not recorded"


def main() -> None:
    command("inspect", InspectJob, inspect)


if __name__ == "__main__":
    main()
