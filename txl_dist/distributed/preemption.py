"""Stopping from outside: after a signal all ranks stop after the same step, save, and exit with code REQUEUE.

Slurm, torchrun and people stop a run with a signal. It may reach one rank or all, sooner or later, at any moment. So
signals are *held back* (blocked) from the first line on: the kernel keeps them pending, they interrupt nothing, and a
second one changes nothing. Threads and child processes inherit that: Slurm signals all processes of a job step, and
those of W&B and of compilers must not die either. At every step, and at every segment of an evaluation, the ranks ask
each other whether any has a signal pending. The answer is read at the next one, when it has long arrived, and is the
same on all ranks.

This module does not need torch, so that signals are held back while torch is being imported.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
# A rank ends the others on its host with this one: held back, too, until the watchdog finds it pending.
END = signal.SIGVTALRM
REQUEUE = 75  # the exit code that asks for the same command to be started again (EX_TEMPFAIL of sysexits.h)


class Preempted(Exception):
    """Raised on all ranks when they have agreed to stop and have saved; says where in the run they are."""


def hold_signals() -> None:
    """Block the signals that stop a run; the kernel keeps them pending."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS | {END})


def signal_within(seconds: float) -> bool:
    """Wait for a new signal from the launcher or from a rank of this host; return whether one came.

    Signals that are pending already do not count: they have asked for something else.
    """
    before = signal.sigpending()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if signal.sigpending() - before:
            return True
        time.sleep(0.1)
    return False


def is_ended() -> bool:
    """Return whether another rank of this host has ended the run, and said why."""
    return END in signal.sigpending()


def pending() -> list[str]:
    """Return the names of the stopping signals that this process has received."""
    return sorted(number.name for number in SIGNALS & signal.sigpending())


def is_stopping(pid: int) -> bool:
    """Return whether another process of this host has received a signal that makes it save and exit."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> (number - 1) & 1 for mask in masks for number in SIGNALS)


class Ranks(Protocol):
    """The part of a ProcessGroup that a Preemption needs."""

    def any(self, flag: bool) -> Callable[[], bool]:
        """Begin to ask whether the flag is set on any rank; the function returned waits for the answer."""


class Preemption:
    """The agreement of all ranks to stop. Every rank must make each call.

    Attributes:
        agreed: whether they have agreed to stop.
    """

    def __init__(self, group: Ranks):
        self.group = group
        self.agreed = False
        self._answer = group.any(bool(pending()))

    def poll(self) -> bool:
        """Return whether any rank had a signal pending at the last poll; takes hardly any time."""
        if not self.agreed:
            self.agreed = self._answer()
            if not self.agreed:
                self._answer = self.group.any(bool(pending()))
        return self.agreed

    def ask(self, where: str) -> None:
        """Raise Preempted if any rank has a signal pending now; waits for all ranks.

        Args:
            where: in the run the ranks are, for the message.
        """
        self.poll()
        if self.poll():
            raise Preempted(where)

    def finish(self) -> None:
        """Wait for the answer that is still on its way: no rank may end before the others have it."""
        if not self.agreed:
            self._answer()
