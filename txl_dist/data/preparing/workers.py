"""The processes that tokenize, and the progress that a person sees meanwhile."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Protocol, TypeVar

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from txl_dist.data.preparing import splitting
from txl_dist.errors import RunError
from txl_dist.tracking.console import PlainConsole

Result = TypeVar("Result")


class HasData(Protocol):
    """A piece of a corpus."""

    @property
    def data(self) -> bytes: ...


AnyPiece = TypeVar("AnyPiece", bound=HasData)


class WorkerPool:
    """Maps functions over pieces of a corpus in several processes, and shows progress on standard error.

    Args:
        workers: how many processes; None: one per CPU. With one, the work is done in this process.
    """

    def __init__(self, workers: int | None):
        self.workers = workers or len(os.sched_getaffinity(0))
        self.console = PlainConsole(stderr=True)
        # Spawned, because a forked child of a process with threads can hang.
        self.pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=ignore_interrupts)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def map(
        self, title: str, function: Callable[[list[AnyPiece]], Result], pieces: Iterable[AnyPiece], size: int
    ) -> Iterator[Result]:
        """Yield the results of batches of pieces, in their order; a bounded number is in progress at a time.

        Args:
            size: of all pieces, in bytes.

        Raises:
            RunError: if a process is killed.
        """
        with self.progress(title, size) as advance:
            if self.workers == 1:
                yield from map(function, batches(pieces, advance))
                return
            pending: deque[Future[Result]] = deque()
            try:
                for batch in batches(pieces, advance):
                    pending.append(self.pool.submit(function, batch))
                    if len(pending) > 2 * self.workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            except BrokenProcessPool as error:
                remedy = "start again, with fewer workers=... if memory was lacking"
                raise RunError([f"{title}: one of the {self.workers} processes was killed; {remedy}"]) from error

    @contextmanager
    def progress(self, title: str, size: int | None) -> Iterator[Callable[[int], None]]:
        """Show a bar of bytes read; yield the function that advances it by a number of bytes."""
        name = TextColumn("{task.description}", markup=False)
        columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        if not self.console.is_terminal:
            self.say(title if size is None else f"{title}: {size:,} bytes")
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(title, total=size)
            yield lambda size: bar.advance(task, size)

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        self.console.print(line, soft_wrap=True)


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the main process, which ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(pieces: Iterable[AnyPiece], advance: Callable[[int], None]) -> Iterator[list[AnyPiece]]:
    """Put small pieces together, up to PIECE_BYTES."""
    batch: list[AnyPiece] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece.data) > splitting.PIECE_BYTES:
            yield batch
            batch = []
            size = 0
        batch.append(piece)
        size += len(piece.data)
        advance(len(piece.data))
    if batch:
        yield batch
