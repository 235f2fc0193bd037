"""The W&B ID of a run directory, in RUN_DIR/wandb_id; wandb_path beside it names the directory it was made for."""

import logging
import os
import secrets
from pathlib import Path

from txl_dist.files.atomic import atomic_file

log = logging.getLogger(__name__)

RESERVED = ":;,#?/'"  # characters that W&B uses in its own addresses
MAX_LENGTH = 128


def claim_run_id(run_dir: str, default: str | None) -> str:
    """Return the W&B ID of a run directory, so that a run that resumes stays one run in W&B.

    A directory without an ID gets the default or, if that is None, a new one. A directory that was moved keeps its ID.
    A copy gets an ID of its own, because its original continues under the old one.

    Raises:
        OSError: if the ID cannot be read or written.
    """
    path = Path(run_dir).resolve()
    run_id = read_id(path)
    if run_id is None and (path / "wandb_id").exists():
        run_id = last_id(path)
        remedy = f"W&B's own files have {run_id}" if run_id else "a new one is made"
        log.warning(f"{run_dir}/wandb_id: does not hold a W&B ID; {remedy}")
    owner = read_owner(path)
    if run_id and owner and owner != path:
        if is_copy(path, owner, run_id):
            log.warning(f"{run_dir}: is a copy of {owner}, which is W&B run {run_id}; this one becomes one of its own")
            run_id = None
        else:
            log.warning(
                f"{run_dir}: was {owner} before, and stays W&B run {run_id}; remove its wandb_id for a run of its own"
            )
    run_id = run_id or default or secrets.token_hex(4)
    if read_id(path) != run_id:
        with atomic_file(path / "wandb_id") as temporary:
            temporary.write_text(run_id + "\n", "utf-8")
    if owner != path:
        with atomic_file(path / "wandb_path") as temporary:
            temporary.write_bytes(os.fsencode(path) + b"\n")
    return run_id


def read_id(run_dir: Path) -> str | None:
    """Return the ID in a run directory; None if there is none, or the file does not hold an ID."""
    try:
        run_id = (run_dir / "wandb_id").read_text("utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return run_id if is_id(run_id) else None


def is_id(text: str) -> bool:
    """Return whether W&B accepts a text as an ID."""
    return 0 < len(text) <= MAX_LENGTH and text.isprintable() and not set(text) & set(RESERVED)


def last_id(run_dir: Path) -> str | None:
    """Return the ID of the latest of W&B's own files in a run directory; None if there are none."""
    files = sorted(run_dir.glob("wandb/*run-*/run-*.wandb"), key=os.path.getmtime)
    return files[-1].stem.removeprefix("run-") if files else None


def read_owner(run_dir: Path) -> Path | None:
    """Return the directory that the ID was made for; None if an earlier version made it."""
    try:
        return Path(os.fsdecode((run_dir / "wandb_path").read_bytes().removesuffix(b"\n")))
    except FileNotFoundError:
        return None


def is_copy(run_dir: Path, owner: Path, run_id: str) -> bool:
    """Return whether `owner` still has the ID and is another directory.

    Different paths do not prove that: one directory may be mounted twice. Then a file made in one appears in the other.
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
