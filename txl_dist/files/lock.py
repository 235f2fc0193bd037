"""Locks: one process at a time writes to a folder, and a second one learns who the first is.

A lock is a file that names its owner. It appears with its content, by a hard link, which is atomic on network file
systems, too. Whether the owner is running is known

    on the same machine    from the process table: immediately, even after a SIGKILL
    elsewhere              while flock is held, it is running. That flock is free means nothing, because many file
                           systems do not share it between hosts: then the owner renews the file's time every BEAT
                           seconds, and counts as dead after SILENCE seconds without that

A copy of a locked folder is not locked: its file has neither the path nor the inode that the owner wrote into it.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from uuid import uuid4

from txl_dist.errors import UserError
from txl_dist.files.owner import Owner

log = logging.getLogger(__name__)

BEAT = 5.0  # seconds between an owner's signs of life
SILENCE = 60.0  # seconds without one, after which an owner on another host counts as dead
POLL = 0.2  # seconds between attempts to take a lock
NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}  # from file systems without them


class InUse(UserError):
    """A lock is held by a running process that is not waited for."""

    def __init__(self, owner: Owner | None):
        super().__init__(f"in use by {owner or 'a process that left no name'}")


class Lock:
    """A lock that this process holds.

    Attributes:
        lost: set when another process has taken the lock because this one seemed dead (suspended for longer than
            SILENCE, or cut off from the file system), or when its file is gone. This process must not write any more
            then.
    """

    def __init__(self, path: Path, handle: int):
        self.path = path
        self.handle = handle
        self.lost = Event()
        self._released = Event()
        self._heart = Thread(target=self._beat, name="lock", daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):  # a network file system that does not answer for a while
                os.utime(self.handle)
                if not is_at(self.path, self.handle):
                    self.lost.set()

    def release(self) -> None:
        """Give up the lock, and remove its file unless another process has taken it."""
        self._released.set()
        with contextlib.suppress(OSError):
            if is_at(self.path, self.handle):
                self.path.unlink()
        self._heart.join(BEAT)
        if not self._heart.is_alive():  # else it waits for a network file system, and needs the handle
            os.close(self.handle)


@contextlib.contextmanager
def locked(path: Path, doing: str, wait: Callable[[Owner | None], bool] = lambda owner: True) -> Iterator[Lock]:
    """Hold a lock, whose file is `path`, within a context.

    Args:
        doing: what this process does meanwhile, for messages to others; such as "training".
        wait: whether to keep waiting for the owner (None: one that left no name); asked again and again.

    Raises:
        InUse: if the lock is held and not waited for.
        OSError: if the file cannot be made.
    """
    lock = acquire(path, doing, wait)
    try:
        yield lock
    finally:
        lock.release()


def acquire(path: Path, doing: str, wait: Callable[[Owner | None], bool]) -> Lock:
    """Take a lock; arguments and errors are those of `locked`."""
    watch = Watch(path)
    announced = False
    while True:
        handle = take_over(path, doing, watch) if os.path.lexists(path) else create(path, doing, link)
        if handle is not None:
            return Lock(path, handle)
        if watch.running and not wait(watch.owner):
            raise InUse(watch.owner)
        if watch.seen and not announced:
            log.warning("%s: waiting for %s", path, watch.owner or "its owner")
            announced = True
        time.sleep(POLL)


class Watch:
    """Observes the owner of a lock over time.

    Attributes:
        owner: as the file names it; None if it cannot be read.
        running: whether the owner is running; None while that is not known.
        seen: whether there has been an owner at all.
    """

    def __init__(self, path: Path):
        self.path = path
        self.owner: Owner | None = None
        self.running: bool | None = None
        self.seen = False
        self._last: tuple[int, int] | None = None  # inode and time of the file
        self._silent_since = 0.0

    def look(self, handle: int, is_free: bool | None) -> None:
        """Look at the lock's file once more; `is_free` is the result of `flock`."""
        self.seen = True
        self.owner = owner = Owner.read(handle)
        file = os.fstat(handle)
        if owner and owner.path != str(self.path.resolve()) and owner.inode != file.st_ino:
            self.running = False  # a copy
        elif owner and owner.is_local:
            self.running = owner.is_running()
        elif is_free is False:
            self.running = True
        elif is_free and owner and owner.is_on_this_kernel:
            self.running = False  # it was in another container on this machine
        elif is_free and not owner and not file.st_size:
            self.running = False  # the empty file that earlier versions locked
        else:
            self._listen((file.st_ino, file.st_mtime_ns))

    def _listen(self, current: tuple[int, int]) -> None:
        if current != self._last:
            self.running = True if self._last else None
            self._last = current
            self._silent_since = time.monotonic()
        elif time.monotonic() - self._silent_since > SILENCE:
            self.running = False


def take_over(path: Path, doing: str, watch: Watch) -> int | None:
    """Take a lock whose owner is dead; return the new file's handle, or None if it is running or another was faster."""
    try:
        handle = open_existing(path)
    except FileNotFoundError:
        return None
    try:
        is_free = flock(handle)
        watch.look(handle, is_free)
        # Those who come at the same moment on one machine wait for each other at the old file.
        if watch.running is not False or is_free is False or not is_at(path, handle):
            return None
        return create(path, doing, replace)
    finally:
        os.close(handle)


def create(path: Path, doing: str, put: Callable[[Path, Path], None]) -> int | None:
    """Put a file that names this process as owner to `path`; return its handle, or None if another was faster."""
    temporary = path.with_name(f"{path.name}.{uuid4().hex}")
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        owner = Owner.this_process(doing, path, os.fstat(handle).st_ino)
        os.write(handle, f"{json.dumps(asdict(owner))}\n".encode())
        flock(handle)
        put(temporary, path)
    except FileExistsError:
        os.close(handle)
        return None
    except BaseException:
        os.close(handle)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return handle


def link(temporary: Path, path: Path) -> None:
    """Give a file a new name; raise FileExistsError if it is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))  # reserves the name
        replace(temporary, path)


def replace(temporary: Path, path: Path) -> None:
    """Give a file the name of another; raise FileExistsError if another process did the same at the same time."""
    inode = temporary.stat().st_ino
    os.replace(temporary, path)
    time.sleep(POLL)  # the last of them wins
    if path.stat().st_ino != inode:
        raise FileExistsError(path)


def open_existing(path: Path) -> int:
    """Open a lock's file, but not through a link."""
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW)  # some network file systems require write access for flock
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def flock(handle: int) -> bool | None:
    """Lock a file for the kernel; False: another process has done so, None: the file system cannot."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_at(path: Path, handle: int) -> bool:
    """Return whether an open file is the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
