"""Files and folders that have their names only when they are complete."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from txl_dist.errors import RunError, UserError, describe_os_error
from txl_dist.files.lock import Lock, locked


def is_empty(folder: Path) -> bool:
    """Return whether there is nothing at `folder` yet, or a folder that holds nothing."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


@contextlib.contextmanager
def lock_of_new_folder(key: str, folder: Path, doing: str) -> Iterator[Lock]:
    """Hold the lock of a folder that is to be made; it lies beside it. A process that comes second waits.

    Args:
        key: of the config, for messages.

    Raises:
        RunError: where nothing can be written there, before or during the context.
    """
    try:
        folder = folder.resolve()
        make_folder(folder.parent)
        with locked(folder.with_name(f".{folder.name}.lock"), doing) as lock:
            yield lock
    except OSError as error:
        raise RunError([f"{key}={folder}: cannot be written: {describe_os_error(error, folder)}"]) from error


@contextlib.contextmanager
def new_folder(folder: Path, lock: Lock) -> Iterator[Path]:
    """Give a folder to write to that takes the name `folder` at the end: one with a final name was complete.

    Raises:
        UserError: where there is something at `folder` by then.
        RunError: where another process has taken the lock.
    """
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():  # of a process that was killed
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        if lock.lost.is_set():
            raise RunError([f"{lock.path}: another process has taken over; this one was silent for too long"])
        if not is_empty(folder):
            raise UserError(f"{folder}: is there already, and nothing is overwritten; give another folder")
        os.replace(partial, folder)
    except BaseException:
        if not lock.lost.is_set():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error
