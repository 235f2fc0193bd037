"""Locks: one process at a time writes to a folder, and a second one learns who the first is.

A lock is a file that names its owner. It appears with its content, by a hard link, which is atomic on network file
systems, too. Whether its owner lives is known

    on the same machine    from the process table, so at once after a SIGKILL
    elsewhere              it lives while flock is held; that it is not says nothing, because many file systems do not
                           share it between hosts: then from the file's time, which the owner renews every BEAT
                           seconds, and after SILENCE seconds without that it counts as dead

A copy of a locked folder is not locked: the file in it has neither the path nor the inode that its owner gave it.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from uuid import uuid4

from txl_dist.distributed.preemption import SIGNALS
from txl_dist.errors import UserError

BEAT = 5.0  # seconds between an owner's signs of life
SILENCE = 60.0  # seconds without one, after which an owner on another host counts as dead
POLL = 0.2  # seconds between attempts to take a lock
NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}  # from file systems without them


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    started: when it began, in the kernel's ticks, so that another process with its number is not taken for it.
    kernel, pids: the running kernel, and the namespace in which process numbers mean the same.
    path, inode: of the lock's file.
    """

    host: str
    pid: int
    started: str | None
    kernel: str
    pids: str
    since: str
    doing: str
    path: str
    inode: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, {self.doing} since {self.since}"

    @property
    def is_local(self) -> bool:
        """Whether its process number means something here."""
        return (self.kernel, self.pids) == (kernel(), process_namespace())

    def lives(self) -> bool:
        """Return whether a local owner is running; one that was killed and not yet waited for is not."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody else's process
        return start_time(self.pid) in (None, self.started)

    def is_stopping(self) -> bool:
        """Return whether a local owner has got a signal that has it save and leave."""
        if not self.is_local:
            return False
        try:
            status = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return False
        masks = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd:", "ShdPnd:"))]
        return any(mask >> (number - 1) & 1 for mask in masks for number in SIGNALS)


class InUse(UserError):
    """A lock is held by a process that lives and is not waited for."""

    def __init__(self, owner: Owner | None):
        super().__init__(f"in use by {owner or 'a process that left no name'}")


class Lock:
    """A lock that this process holds.

    Attributes:
        lost: set when another process has taken it, for which this one seemed dead (suspended for longer than SILENCE,
            or cut off from the file system), or when its file is gone. This process must not write any more then.
    """

    def __init__(self, path: Path, handle: int):
        self.path, self.handle = path, handle
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
        """Give the lock up, and remove its file."""
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
        doing: for those who come second, such as "training".
        wait: whether to go on waiting for its owner (None: one that left no name), asked again and again.

    Raises:
        InUse: where it is held and not waited for.
        OSError: where the file cannot be made.
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
        if watch.alive and not wait(watch.owner):
            raise InUse(watch.owner)
        if watch.seen and not announced:
            print(f"{path}: waiting for {watch.owner or 'its owner'}", file=sys.stderr, flush=True)
            announced = True
        time.sleep(POLL)


class Watch:
    """Watches the owner of a lock.

    Attributes:
        owner: as the file names it, None where it cannot be read.
        alive: None while that is not known.
        seen: whether there has been an owner at all.
    """

    def __init__(self, path: Path):
        self.path = path
        self.owner: Owner | None = None
        self.alive: bool | None = None
        self.seen = False
        self._last: tuple[int, int] | None = None  # inode and time of the file
        self._silent_since = 0.0

    def look(self, handle: int, is_free: bool | None) -> None:
        """Look at the lock's file once more. `is_free`: as `flock` returned."""
        self.seen = True
        self.owner = owner = read_owner(handle)
        file = os.fstat(handle)
        if owner and owner.path != str(self.path.resolve()) and owner.inode != file.st_ino:
            self.alive = False  # a copy
        elif owner and owner.is_local:
            self.alive = owner.lives()
        elif is_free is False:
            self.alive = True
        elif is_free and (owner.kernel == kernel() if owner else not file.st_size):
            self.alive = False  # of another container on this machine, or the empty file that earlier versions locked
        else:
            self._listen((file.st_ino, file.st_mtime_ns))

    def _listen(self, now: tuple[int, int]) -> None:
        if now != self._last:
            self.alive = True if self._last else None
            self._last = now
            self._silent_since = time.monotonic()
        elif time.monotonic() - self._silent_since > SILENCE:
            self.alive = False


def take_over(path: Path, doing: str, watch: Watch) -> int | None:
    """Take a lock whose owner is dead; return the new file's handle, or None where it lives or another was faster."""
    try:
        handle = open_existing(path)
    except FileNotFoundError:
        return None
    try:
        is_free = flock(handle)
        watch.look(handle, is_free)
        # Those who come at the same moment on one machine wait for each other at the old file.
        if watch.alive is not False or is_free is False or not is_at(path, handle):
            return None
        return create(path, doing, replace)
    finally:
        os.close(handle)


def create(path: Path, doing: str, put: Callable[[Path, Path], None]) -> int | None:
    """Put a file that names this process as owner to `path`; return its handle, None where another was faster."""
    temporary = path.with_name(f"{path.name}.{uuid4().hex}")
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        owner = Owner(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=start_time(os.getpid()),
            kernel=kernel(),
            pids=process_namespace(),
            since=f"{datetime.now():%Y-%m-%d %H:%M:%S}",
            doing=doing,
            path=str(path.resolve()),
            inode=os.fstat(handle).st_ino,
        )
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
    """Give a file a name that nobody else has; raise FileExistsError where somebody has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        replace(temporary, path)


def replace(temporary: Path, path: Path) -> None:
    """Give a file the name of another; raise FileExistsError where another process did the same at the same time."""
    inode = temporary.stat().st_ino
    os.replace(temporary, path)
    time.sleep(POLL)  # the last of them wins
    if path.stat().st_ino != inode:
        raise FileExistsError(path)


def open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW)  # some network file systems want to write for flock
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def flock(handle: int) -> bool | None:
    """Lock a file for the kernel: False where another process has done so, None where the file system cannot."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def read_owner(handle: int) -> Owner | None:
    """Return the owner that a lock's file names, None where it cannot be read."""
    try:
        content = json.loads(os.pread(handle, 1 << 16, 0))
        owner = Owner(**content)
        return owner if type(owner.pid) is int and 0 < owner.pid < 1 << 31 else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def is_at(path: Path, handle: int) -> bool:
    """Return whether an open file is the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def kernel() -> str:
    """Name the running kernel: another name after every boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def process_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_time(pid: int) -> str | None:
    """Return when a process began, in the kernel's ticks; "" where it has ended, None where it cannot be known."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = content.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]
