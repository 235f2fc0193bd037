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
