"""Hashes, and files and folders that get their final name only once they are complete and on disk."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from txl_dist.errors import RunError, UserError, describe_os_error
from txl_dist.files.lock import Lock, locked


def sha256_of(stream: BinaryIO) -> str:
    """Return the SHA-256 of the rest of a stream, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as stream:
        return sha256_of(stream)


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of a value's JSON, which does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to disk; without that, a power failure may keep the name and lose the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(temporary: Path, path: Path) -> None:
    """Give a complete file or folder its final name, both flushed to disk."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove a folder with all it holds, or a file or link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` at the end, and is removed if the writing fails.

    The temporary name ends like `path`, for writers that choose a format by it.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    temporary = path.with_name(f".partial-{path.name}")
    try:
        yield temporary
        rename(temporary, path)
    except OSError as error:  # the error of a full disk names no file
        if error.errno is None or error.filename not in (None, str(temporary), temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_empty(folder: Path) -> bool:
    """Return whether there is nothing at `folder` yet, or a folder that holds nothing."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


@contextlib.contextmanager
def lock_of_new_folder(key: str, folder: Path, doing: str) -> Iterator[Lock]:
    """Hold a lock beside a folder that is to be made; a second process waits.

    Args:
        key: of the config, for messages.
        doing: such as "preparing a dataset", for the messages of processes that wait.

    Raises:
        RunError: if nothing can be written there, before or during the context.
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
    """Yield a temporary folder to write to; it becomes `folder` at the end, and is removed if the writing fails.

    Raises:
        UserError: if there is something at `folder` by then.
        RunError: if another process has taken the lock.
    """
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():  # a process was killed
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        if lock.lost.is_set():
            raise RunError([f"{lock.path}: another process has taken over; this one was silent for too long"])
        if not is_empty(folder):
            raise UserError(f"{folder}: is there already, and nothing is overwritten; give another folder")
        for path in partial.rglob("*"):
            sync(path)
        rename(partial, folder)
    except BaseException:
        if not lock.lost.is_set():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        NotADirectoryError: if a file is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error
