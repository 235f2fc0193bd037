"""Run functions in forked processes with limits: to start Python with torch would take seconds for each case."""

import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

MIB = 1 << 20
SECONDS = 30  # of the processor
PATIENCE = 600  # seconds: a shared machine is slow at times, and a command may wait for ever
MEMORY = 2048  # MiB, resident
ADDRESSES = 8192  # MiB more than the parent has: DeepSpeed reserves buckets of 2,000 that it never touches


class Outcome(NamedTuple):
    """The end of a process.

    Attributes:
        seconds: of CPU time, or of waiting if PATIENCE was exceeded.
        peak: resident memory in MiB.
    """

    code: int
    output: str
    seconds: float
    peak: int

    @property
    def fault(self) -> str | None:
        """Why the end of the command is a fault; None if it is not."""
        if self.seconds >= SECONDS:
            return f"took {self.seconds:.0f} seconds"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if "Traceback (most recent call last)" in self.output or "Exception ignored" in self.output:
            return "traceback"
        if self.peak > MEMORY:
            return f"{self.peak} MiB of memory"
        return None


def call(function: Callable[[], object], log: Path) -> Outcome:
    """Fork, call, and wait; standard output and error go to `log`."""
    sys.stdout.flush()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        run_limited(function, log)
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - start > PATIENCE:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    waited = time.monotonic() - start
    seconds = waited if waited > PATIENCE else usage.ru_utime + usage.ru_stime
    return Outcome(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), seconds, usage.ru_maxrss // 1024)


def run_limited(function: Callable[[], object], log: Path) -> NoReturn:
    code = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        sys.stdout = sys.__stdout__
        sys.stderr = sys.__stderr__
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + ADDRESSES * MIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(module: str, *arguments: str) -> Callable[[], None]:
    """Return a function that does what `python -m MODULE ARGUMENTS...` does."""

    def run() -> None:
        sys.argv = [module, *arguments]
        importlib.import_module(module).main()

    return run
