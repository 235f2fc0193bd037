"""A run that stands still: what keeps it from going on is described, and the run ends.

A host or the network is gone: those that do not answer are named. Or a process hangs, or is stopped, and all others
wait for it without a word. On each host one process that is still awake
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

from txl_dist.distributed.peers import CONTINUES, PRINTING
from txl_dist.distributed.preemption import is_to_end, pending
from txl_dist.distributed.process_group import ProcessGroup

STDERR = 2  # the file itself, whatever sys.stderr has become


class Watchdog:
    """Watches over one start of a run, from `meet` to the end of its context.

    Args:
        timeout: seconds without a `beat` after which the run ends; None: never. Seconds in which the process itself is
            stopped do not count: a job may be suspended as a whole, and goes on.
    """

    def __init__(self, timeout: float | None):
        self.timeout, self.idle, self.last = timeout, 0.0, "the start"
        self.ended = threading.Event()

    @property
    def patience(self) -> float | None:
        """Seconds for which process groups are to wait: longer, for the watchdog has more to say."""
        return None if self.timeout is None else 2 * self.timeout + 60

    def meet(self, group: ProcessGroup) -> None:
        """Begin to watch, now that this process has met the others: that has a time limit of its own."""
        self.peers = group.peers
        if self.timeout is not None:
            threading.Thread(target=self._watch, args=(self.timeout,), name="watchdog", daemon=True).start()

    def beat(self, done: str) -> None:
        """Something is done."""
        self.idle, self.last = 0.0, done

    def __enter__(self) -> "Watchdog":
        faulthandler.register(signal.SIGQUIT, STDERR, all_threads=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self, timeout: float) -> None:
        tick = min(1.0, timeout / 10)
        while not self.ended.wait(tick):
            if is_to_end():
                os._exit(1)
            self.idle += tick
            # For the case that something in C holds Python's lock in all processes, and this thread stands still too.
            faulthandler.dump_traceback_later(2 * timeout + 30, file=STDERR, exit=True)
            # One speaks; the next one does if that has not ended all others in its time.
            if self.idle >= timeout + self.peers.turn:
                self._end()

    def _end(self) -> None:
        try:
            self._describe()
        finally:
            self.peers.end_mates()
            os._exit(1)

    def _describe(self) -> None:
        missing = self.peers.missing()
        say(f"\nNothing was done for {self.idle:.0f} seconds after {self.last} (guard.stall_timeout): the run ends.")
        if signals := pending():
            say(f"  {' and '.join(signals)} came, but the ranks could not agree to stop: nothing was saved.")
        for line in [*missing, CONTINUES] if missing else ():
            say(f"  {line}")
        for rank, pid in self.peers.mates.items() if not missing else ():
            say(f"--- rank {rank} (process {pid} on {socket.gethostname()}) stands here:")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)  # first: one that is stopped shall not move on before it prints
                os.kill(pid, signal.SIGCONT)
            time.sleep(PRINTING)


def say(words: str) -> None:
    os.write(STDERR, f"{words}\n".encode())
