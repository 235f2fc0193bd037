"""Being stopped from outside: all ranks stop after the same step, save, and exit with REQUEUE.

Slurm, torchrun and people stop a run with a signal. It may reach one rank or all, sooner or later, at any moment. So
signals are *held back* (blocked) from the first line on: the kernel keeps them pending, they interrupt nothing, and a
second one changes nothing. Threads and child processes inherit that: Slurm signals all processes of a job step, and
W&B's and compilers shall not die of it either. At every step, and at every segment of an evaluation, the ranks ask each
other whether any has a signal pending. The answer is read at the next one, when it has long arrived, and is the same on
all ranks.

This module needs no torch, so that signals are held back while that is being imported.
"""

import signal
import time
from collections.abc import Callable
from typing import Protocol

SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
END = signal.SIGVTALRM  # by which a rank ends the others on its host: held back, too, until the watchdog looks
REQUEUE = 75  # the exit code that says: start the same command again (EX_TEMPFAIL of sysexits.h)


class Preempted(Exception):
    """All ranks have agreed to stop, and what is to be saved is saved. Says where they were."""


def hold_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS | {END})


def signal_within(seconds: float) -> bool:
    """Wait for a signal from the launcher or from a rank of this host; one that came before asks for something else."""
    before = signal.sigpending()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if signal.sigpending() - before:
            return True
        time.sleep(0.1)
    return False


def is_to_end() -> bool:
    """Whether another rank of this host has ended the run, and said why."""
    return END in signal.sigpending()


def pending() -> list[str]:
    """The names of the signals that this process has got."""
    return sorted(each.name for each in SIGNALS & signal.sigpending())


class Ranks(Protocol):
    def any(self, mine: bool) -> Callable[[], bool]: ...


class Preemption:
    """The ranks' agreement to stop. Every rank must make each call.

    Attributes:
        agreed: whether they have.
    """

    def __init__(self, group: Ranks):
        self.group, self.agreed = group, False
        self._answer = group.any(bool(pending()))

    def poll(self) -> bool:
        """Whether any rank had a signal pending at the last poll; costs next to nothing."""
        if not self.agreed:
            self.agreed = self._answer()
            if not self.agreed:
                self._answer = self.group.any(bool(pending()))
        return self.agreed

    def ask(self, where: str) -> None:
        """Raise Preempted if any rank has a signal pending now; waits for all of them."""
        self.poll()
        if self.poll():
            raise Preempted(where)

    def finish(self) -> None:
        """Read the answer that is still on its way: no rank may end before the others have it."""
        if not self.agreed:
            self._answer()
