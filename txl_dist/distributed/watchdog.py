"""The watchdog ends a run that makes no progress, and describes what holds it up.

If a host or the network is gone, the hosts that do not answer are named. Otherwise a process hangs, or is stopped, and
all others wait for it silently. On each host one process that still runs speaks for all: it has each of them print the
stacks of its threads, one after the other, and then ends them. The others print them by faulthandler, at SIGQUIT, even
while C code holds Python's lock; one that is stopped is woken up first.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

from txl_dist.distributed.logs import log_exit
from txl_dist.distributed.peers import CONTINUES, PRINTING, REPORTING
from txl_dist.distributed.preemption import is_ended, pending
from txl_dist.distributed.process_group import ProcessGroup

STDERR = 2  # the file descriptor, whatever sys.stderr has become


class Watchdog:
    """Watches over one start of a run, from `start` to the end of its context.

    Args:
        timeout: seconds without a `beat` after which the run ends; None: never. Seconds in which the process itself is
            stopped do not count: a job may be suspended as a whole and continued later.

    Attributes:
        on_stall: is called with the first line of the message where this process is the one that ends the run on its
            host, and has REPORTING seconds; set it to what informs others, or to None.
    """

    def __init__(self, timeout: float | None):
        self.timeout = timeout
        self.on_stall: Callable[[str], None] | None = None
        self.idle = 0.0  # seconds since the last beat
        self.last = "the start"  # what was done then
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    @property
    def patience(self) -> float | None:
        """Return the seconds for which process groups wait: longer, because the watchdog says more about the cause."""
        return None if self.timeout is None else 2 * self.timeout + 60

    def start(self, group: ProcessGroup) -> None:
        """Begin to watch, once the process group is formed: forming it has a time limit of its own."""
        self.peers = group.peers
        if self.timeout is not None:
            self.thread = threading.Thread(target=self._watch, args=(self.timeout,), name="watchdog", daemon=True)
            self.thread.start()

    def beat(self, done: str) -> None:
        """Restart the timeout, because something was done: `done` says what, for the message."""
        self.idle = 0.0
        self.last = done

    def __enter__(self) -> "Watchdog":
        faulthandler.register(signal.SIGQUIT, STDERR, all_threads=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ended.set()
        if self.thread:
            # If it is just ending the run, connections break, and this context is left because of that.
            self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self, timeout: float) -> None:
        tick = min(1.0, timeout / 10)
        while not self.ended.wait(tick):
            if is_ended():
                os._exit(1)
            self.idle += tick
            # In case C code holds Python's lock in all processes, and this thread cannot run either.
            faulthandler.dump_traceback_later(2 * timeout + 30, file=STDERR, exit=True)
            # The first one speaks; the next one does if that has not ended all others in its time.
            if self.idle >= timeout + self.peers.turn:
                self._end()

    def _end(self) -> None:
        lines: list[str] = []
        try:
            unreachable = self.peers.unreachable()
            lines += self._describe(unreachable)
            say("\n" + "\n".join(lines))
            report = self._report(lines[0])
            if not unreachable:
                self._print_stacks()
            report.join(REPORTING)
        finally:
            self.peers.end_local()
            log_exit("\n".join(lines))  # last, because writing to a disk that does not answer never returns
            os._exit(1)

    def _report(self, line: str) -> threading.Thread:
        """Call `on_stall` in a thread, because what it does may hang as well."""
        thread = threading.Thread(target=self.on_stall, args=(line,), name="stall", daemon=True)
        thread.start()
        return thread

    def _describe(self, unreachable: list[str]) -> list[str]:
        """Describe, in lines, why the run ends."""
        lines = [f"Nothing was done for {self.idle:.0f} seconds after {self.last} (guard.stall_timeout): the run ends."]
        signals = pending()
        if signals:
            lines.append(f"  {' and '.join(signals)} came, but the ranks could not agree to stop: nothing was saved.")
        if unreachable:
            lines += [f"  {line}" for line in [*unreachable, CONTINUES]]
        return lines

    def _print_stacks(self) -> None:
        """Have each process of this host print the stacks of its threads."""
        for rank, pid in self.peers.local_pids.items():
            say(f"--- rank {rank} (process {pid} on {socket.gethostname()}) stands here:")
            if pid == os.getpid():
                # Not by the signal: its handler runs without Python's lock, and crashes where a thread runs Python,
                # as the one that reports does.
                faulthandler.dump_traceback(STDERR, all_threads=True)
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)  # first: one that is stopped must not continue before it prints
                os.kill(pid, signal.SIGCONT)
            time.sleep(PRINTING)


def say(text: str) -> None:
    """Write a line or several to standard error without Python's buffers and locks."""
    os.write(STDERR, f"{text}\n".encode())
