"""The checkpoints of a run as W&B's artifacts by reference, and the dataset that it is trained on as the used artifact.

RUN_DIR/wandb_artifacts.json says what W&B has already:

    {"id": "0a1b2c3d", "versions": {"step-000000500": ["SHA-256 of its checkpoint.json", "step-500", "best"]}}
"""

import json
import re
from pathlib import Path
from typing import Any

from txl_dist.checkpoint.format import Checkpoint, best, latest, steps, valid_checkpoints
from txl_dist.files.atomic import atomic_file, sha256_of_file

FILE = "wandb_artifacts.json"

Versions = dict[str, list[str]]  # name of a checkpoint -> SHA-256 of its checkpoint.json, and its aliases


def log_checkpoints(wandb: Any, run: Any, run_dir: str) -> None:
    """Log the valid checkpoints of a run, each once, as versions of the artifact checkpoints-ID; no content is read.

    A version refers to the files of a checkpoint, under a name that has the SHA-256 of checkpoint.json: so a checkpoint
    that is written again at the same place is another version, and one that is logged twice is not. Its aliases are
    step-N and best; W&B gives `latest` to what is logged last, and moves an alias from one version to another.

    Raises:
        Exception: whatever W&B raises.
    """
    checkpoints = list(valid_checkpoints(run_dir, steps(run_dir)))
    lowest = best(run_dir)
    versions = {checkpoint.path.name: describe(checkpoint, lowest) for checkpoint in checkpoints}
    known = read_versions(run_dir, run.id)
    new = [checkpoint for checkpoint in checkpoints if not is_known(checkpoint, versions, known)]
    if new and new[-1].step != checkpoints[-1].step:
        new.append(checkpoints[-1])  # it stays `latest`
    for checkpoint in new:
        sha256, *aliases = versions[checkpoint.path.name]
        facts = {"step": checkpoint.step, "tokens": checkpoint.state["tokens"], "valid_loss": checkpoint.valid_loss}
        artifact = wandb.Artifact(collection(run.id), type="model", metadata=facts | {"sha256": sha256})
        uri = checkpoint.path.resolve().as_uri()
        artifact.add_reference(uri, name=f"{checkpoint.path.name}-{sha256[:12]}", checksum=False)
        run.log_artifact(artifact, aliases=aliases)
    if new:
        with atomic_file(Path(run_dir) / FILE) as temporary:
            temporary.write_text(json.dumps({"id": run.id, "versions": versions}) + "\n", "utf-8")


def collection(run_id: str) -> str:
    """Return the name of the artifact whose versions are the checkpoints; it has fewer characters than an ID may."""
    return "checkpoints-" + re.sub("[^a-zA-Z0-9_.-]", "-", run_id)[:100]


def describe(checkpoint: Checkpoint, lowest: Checkpoint | None) -> list[str]:
    """Return the SHA-256 of a checkpoint's manifest, which has those of all other files, and its aliases."""
    aliases = [f"step-{checkpoint.step}"]
    if lowest and lowest.step == checkpoint.step:
        aliases.append("best")
    return [sha256_of_file(checkpoint.path / "checkpoint.json"), *aliases]


def is_known(checkpoint: Checkpoint, versions: Versions, known: Versions) -> bool:
    """Return whether W&B has a checkpoint, with all aliases that it has now."""
    name = checkpoint.path.name
    return set(versions[name]) <= set(known.get(name, []))


def read_versions(run_dir: str, run_id: str) -> Versions:
    """Return what was logged of a run; nothing where it was logged under another ID, as before it was copied."""
    try:
        content = json.loads((Path(run_dir) / FILE).read_text("utf-8"))
        versions: Versions = content["versions"] if content["id"] == run_id else {}
        return {name: list(map(str, version)) for name, version in versions.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # without it, or damaged: all is logged again
        return {}


def use_dataset(wandb: Any, run: Any, run_dir: str) -> None:
    """Declare the dataset as the artifact that a run uses: its fingerprint and location, without files.

    W&B refuses this of an offline run (`use_artifact` needs its server), where only the config has both, as `dataset`.

    Raises:
        Exception: whatever W&B raises.
    """
    checkpoint = latest(run_dir)
    if checkpoint is None:
        return
    facts = {"fingerprint": checkpoint.data["fingerprint"], "location": checkpoint.data.get("place")}
    run.config.update({"dataset": facts}, allow_val_change=True)
    if not run.offline:
        run.use_artifact(wandb.Artifact(f"dataset-{facts['fingerprint'][:16]}", type="dataset", metadata=facts))
