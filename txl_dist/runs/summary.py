"""Summarize a checkpoint: the step, the lanes, the data, the split that wrote it, and how much it holds."""

from typing import Any

from txl_dist.checkpoint.format import Checkpoint


def summarize(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts of a checkpoint, ready for JSON; of an imported model those that it has.

    Raises:
        UserError: where a file of tensors cannot be read.
    """
    state = checkpoint.state
    config = checkpoint.config
    data = {"dir": config["data"]["dir"]} | checkpoint.data
    kinds = ["weights"] if "imported" in state else ["weights", "optimizer", "memory"]
    holds = {kind: checkpoint.inventory(kind)._asdict() for kind in kinds}
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


def describe(summary: dict[str, Any]) -> dict[str, str]:
    """Describe where a checkpoint comes from, in lines for people, by label."""
    return describe_import(summary) if "imported" in summary else describe_training(summary)


def describe_import(summary: dict[str, Any]) -> dict[str, str]:
    """Describe an imported model."""
    source = summary["imported"]
    data = summary["data"]
    return {
        "imported": f"from {source['from']}: {source['title']}",
        "data": f"{data['dir'] or 'none'}, vocabulary of {data['vocab_size']:,}",
        "versions": describe_versions(summary["written_by"]),
    }


def describe_training(summary: dict[str, Any]) -> dict[str, str]:
    """Describe a checkpoint of a run that was trained here."""
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
    """Describe by how many ranks, and how, a checkpoint was written."""
    if "ranks" not in written_by:
        return "an earlier version of txl_dist"
    ranks = written_by["ranks"]
    stages = written_by["pipeline_stages"]
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
