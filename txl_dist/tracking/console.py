"""What a person sees while a run trains: a progress line in a terminal, plain lines in a file."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


FILE_WIDTH = 1000  # characters: a table in a file is as wide as its cells, and a path in it can be searched for


class PlainConsole(Console):
    """Prints texts as they are: to rich, the [brackets] and :colons: of a path or a token would be markup."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        if not self.is_terminal:
            self.width = FILE_WIDTH


@contextlib.contextmanager
def going_on_unheard() -> Iterator[None]:
    """Let a run go on where standard output takes no more, as a log on a full disk: metrics.jsonl has everything."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):  # standard error may be the same log
            print(f"standard output: {error.strerror}; the run goes on without it", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what waits in buffers, and what is still to come


class ConsoleReporter:
    """Shows a run from step `start` to `stop`. One that is not `shown` (all ranks but the first) is silent."""

    def __init__(self, start: int, stop: int, shown: bool):
        self.console = PlainConsole(quiet=not shown, soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
            transient=True,
        )
        self.stop = stop
        self.task = self.progress.add_task("training", total=stop, completed=start, told="")
        self.progress.start()

    def say(self, words: RenderableType) -> None:
        with going_on_unheard():
            self.console.print(words)

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def log(self, metrics: dict[str, Any]) -> None:
        told = in_words(metrics)
        if self.console.is_terminal and "valid/loss" not in metrics and "test/loss" not in metrics:
            self.progress.update(self.task, told=told)
        else:
            self.say(f"step {metrics['step']:>{len(str(self.stop))}}/{self.stop}  {told}")

    def watch(self, items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
        """Pass items through under a progress bar of their own."""
        task = self.progress.add_task(what, total=total, told="")
        for item in items:
            yield item
            self.progress.advance(task)
        self.progress.remove_task(task)

    def close(self) -> None:
        self.progress.stop()


def in_words(metrics: dict[str, Any]) -> str:
    words = []
    for split in ("train", "valid", "test"):
        if f"{split}/loss" in metrics:
            words.append(f"{split} loss {metrics[f'{split}/loss']:.4f}")
        if f"{split}/bits_per_byte" in metrics:
            words.append(f"{split} bits/byte {metrics[f'{split}/bits_per_byte']:.4f}")
    if "train/tokens_per_second" in metrics:
        words.append(f"lr {metrics['train/lr']:.2e}  {metrics['train/tokens_per_second']:,.0f} tokens/s")
    if "train/mfu" in metrics:
        words.append(f"MFU {metrics['train/mfu']:.1%}")
    return "  ".join(words)
