"""The W&B id of a run directory: in RUN_DIR/wandb_id, and beside it, in wandb_path, the directory that has it."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from txl_dist.files.atomic import atomic_file

RESERVED = ":;,#?/'"  # W&B uses them in its own addresses
MAX_LENGTH = 128


def claim_run_id(run_dir: str, wanted: str | None, say: Callable[[str], None]) -> str:
    """Return the W&B id of a run directory, so that a run that goes on is one run there too.

    A directory that has none gets the one that is `wanted`, or a new one. A directory that was moved keeps its id. A
    copy gets an id of its own, because its original goes on under the old one.

    Raises:
        OSError: where the id cannot be read or written.
    """
    here = Path(run_dir).resolve()
    run_id = read_id(here)
    if run_id is None and (here / "wandb_id").exists():
        run_id = last_id(here)
        instead = f"W&B's own files have {run_id}" if run_id else "a new one is made"
        say(f"{run_dir}/wandb_id: holds no W&B id; {instead}")
    owner = read_owner(here)
    if run_id and owner and owner != here:
        if is_copy(here, owner, run_id):
            say(f"{run_dir}: is a copy of {owner}, which is W&B run {run_id}; this one becomes one of its own")
            run_id = None
        else:
            say(f"{run_dir}: was {owner} before, and stays W&B run {run_id}; remove its wandb_id for a run of its own")
    run_id = run_id or wanted or secrets.token_hex(4)
    if read_id(here) != run_id:
        with atomic_file(here / "wandb_id") as temporary:
            temporary.write_text(run_id + "\n", "utf-8")
    if owner != here:
        with atomic_file(here / "wandb_path") as temporary:
            temporary.write_bytes(os.fsencode(here) + b"\n")
    return run_id


def read_id(run_dir: Path) -> str | None:
    """Return the id in a run directory; None where there is none, or something that is not an id."""
    try:
        run_id = (run_dir / "wandb_id").read_text("utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return run_id if is_id(run_id) else None


def is_id(text: str) -> bool:
    return 0 < len(text) <= MAX_LENGTH and text.isprintable() and not set(text) & set(RESERVED)


def last_id(run_dir: Path) -> str | None:
    """Return the id of the latest of W&B's own files in a run directory."""
    files = sorted(run_dir.glob("wandb/*run-*/run-*.wandb"), key=os.path.getmtime)
    return files[-1].stem.removeprefix("run-") if files else None


def read_owner(run_dir: Path) -> Path | None:
    """Return the directory that the id was made for; None where earlier versions made it."""
    try:
        return Path(os.fsdecode((run_dir / "wandb_path").read_bytes().removesuffix(b"\n")))
    except FileNotFoundError:
        return None


def is_copy(run_dir: Path, owner: Path, run_id: str) -> bool:
    """Return whether `owner` still has the id and is another directory.

    A path alone does not say so: one directory may be mounted at two places. What is written here appears there then.
    """
    try:
        if read_id(owner) != run_id:
            return False
    except (OSError, ValueError):  # moved away, of another machine, or not a path at all
        return False
    probe = run_dir / f".wandb_id-{secrets.token_hex(4)}"
    probe.touch()
    try:
        return not (owner / probe.name).exists()
    finally:
        probe.unlink()
