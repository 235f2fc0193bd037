"""A run that stands still: every process tells where it stands, and the run ends.

A process hangs, or is stopped, and all others wait for it without a word. On each host one process that is still awake
speaks for all: it has each of them print the stacks of its threads, one after the other, and then ends them. A process
does so by faulthandler, at SIGQUIT, even while something in C holds Python's lock; one that is stopped is woken before.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time
from types import TracebackType

import torch.distributed as dist

from txl_dist.engine.launch import World

STDERR = 2  # the file itself, whatever sys.stderr has become
PRINTING = 0.5  # seconds that a process has for its stacks


class Watchdog:
    """Watches over one start of a run, from `with` on.

    Args:
        timeout: seconds without a `beat` after which the run ends; None: never. Seconds in which the process itself is
            stopped do not count: a job may be suspended as a whole, and goes on.
    """

    def __init__(self, timeout: float | None):
        self.timeout, self.idle, self.last = timeout, 0.0, "the start"
        self.mates = {int(os.environ.get("RANK", "0")): os.getpid()}
        self.ended = threading.Event()

    @property
    def patience(self) -> float | None:
        """Seconds for which process groups are to wait: longer, for the watchdog has more to say."""
        return None if self.timeout is None else 2 * self.timeout + 60

    def meet(self, world: World) -> None:
        """Know the processes of this host; every rank must call it."""
        told: list[tuple[str, int]] = [("", 0)] * world.size
        dist.all_gather_object(told, (socket.gethostname(), os.getpid()))
        self.mates = {rank: pid for rank, (host, pid) in enumerate(told) if host == socket.gethostname()}

    def beat(self, done: str) -> None:
        """Something is done."""
        self.idle, self.last = 0.0, done

    def __enter__(self) -> "Watchdog":
        faulthandler.register(signal.SIGQUIT, STDERR, all_threads=True)
        if self.timeout is not None:
            threading.Thread(target=self._watch, args=(self.timeout,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self, timeout: float) -> None:
        tick = min(1.0, timeout / 10)
        while not self.ended.wait(tick):
            self.idle += tick
            # For the case that something in C holds Python's lock in all processes, and this thread stands still too.
            faulthandler.dump_traceback_later(2 * timeout, file=STDERR, exit=True)
            # One speaks; the next one does if that has not ended all others in its time.
            before = list(self.mates.values()).index(os.getpid())
            if self.idle >= timeout + before * PRINTING * (len(self.mates) + 2):
                self._end()

    def _end(self) -> None:
        say(f"\nNothing was done for {self.idle:.0f} seconds after {self.last} (guard.stall_timeout): the run ends.")
        for rank, pid in self.mates.items():
            say(f"--- rank {rank} (process {pid} on {socket.gethostname()}) stands here:")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)  # first: one that is stopped shall not move on before it prints
                os.kill(pid, signal.SIGCONT)
            time.sleep(PRINTING)
        for pid in self.mates.values():
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        os._exit(1)


def say(words: str) -> None:
    os.write(STDERR, f"{words}\n".encode())
