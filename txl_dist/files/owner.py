"""The process that owns a lock: its identity across machines and containers, and whether it is running."""

import json
import os
import socket
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        started: when it started, in the kernel's ticks, to distinguish it from a later process with the same number.
        kernel: the running kernel.
        pids: the namespace in which process numbers mean the same.
        since: when it took the lock.
        doing: such as "training", for messages.
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

    @classmethod
    def this_process(cls, doing: str, path: Path, inode: int) -> "Owner":
        """Return this process as the owner of the lock at `path`."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=start_time(os.getpid()),
            kernel=kernel(),
            pids=process_namespace(),
            since=f"{datetime.now():%Y-%m-%d %H:%M:%S}",
            doing=doing,
            path=str(path.resolve()),
            inode=inode,
        )

    @classmethod
    def read(cls, handle: int) -> "Owner | None":
        """Return the owner that a lock's file names; None if it cannot be read."""
        try:
            owner = cls(**json.loads(os.pread(handle, 1 << 16, 0)))
            return owner if type(owner.pid) is int and 0 < owner.pid < 1 << 31 else None
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, {self.doing} since {self.since}"

    @property
    def is_on_this_kernel(self) -> bool:
        """Whether it runs on this machine, perhaps in another container."""
        return self.kernel == kernel()

    @property
    def is_local(self) -> bool:
        """Whether its process number means the same for this process."""
        return self.is_on_this_kernel and self.pids == process_namespace()

    def is_running(self) -> bool:
        """Return whether a local owner is running; one that was killed and not yet waited for is not."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # a process of another user
        return start_time(self.pid) in (None, self.started)


def kernel() -> str:
    """Name the running kernel; the name changes with every boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def process_namespace() -> str:
    """Name the namespace in which process numbers mean the same; "" if it is not known."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_time(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks; "" if it has ended, None if it cannot be known."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = content.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
