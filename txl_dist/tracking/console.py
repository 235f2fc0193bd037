"""The console of a run that trains: a progress line in a terminal, plain lines in a file."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from txl_dist.distributed.logs import output_optional
from txl_dist.tracking.events import Event
from txl_dist.tracking.schema import METRICS

log = logging.getLogger(__name__)

Item = TypeVar("Item")

FILE_WIDTH = 1000  # characters: a table in a file is as wide as its cells, and a path in it can be searched for


class PlainConsole(Console):
    """Prints texts as they are: to rich, the [brackets] and :colons: of a path or a token would be markup."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        if not self.is_terminal:
            self.width = FILE_WIDTH


class ConsoleReporter:
    """Shows the progress and the metrics of a run from step `start` to `stop`.

    Args:
        shown: whether this is the rank that shows them; the reporter of any other rank is silent.
    """

    def __init__(self, start: int, stop: int, shown: bool):
        self.console = PlainConsole(quiet=not shown, soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
            transient=True,
        )
        self.stop = stop
        self.task = self.progress.add_task("training", total=stop, completed=start, metrics="")
        self.progress.start()

    def say(self, message: str) -> None:
        """Log a message, which rank zero shows above the progress line."""
        log.info(message)

    def show(self, table: RenderableType) -> None:
        """Print a table above the progress line."""
        with output_optional():
            self.console.print(table)

    def advance(self, step: int) -> None:
        """Move the progress line to a step."""
        self.progress.update(self.task, completed=step)

    def log(self, metrics: dict[str, Any]) -> None:
        """Show the metrics of a step: in the progress line of a terminal, in a line of their own if evaluated.

        Metrics for charts alone are not shown.
        """
        text = format_metrics(metrics)
        if not text:
            return
        if self.console.is_terminal and "valid/loss" not in metrics and "test/loss" not in metrics:
            self.progress.update(self.task, metrics=text)
        else:
            self.say(f"step {metrics['step']:>{len(str(self.stop))}}/{self.stop}  {text}")

    def record(self, event: Event) -> None:
        """Show the samples of an event; the training loop says what there is to say of others."""
        for sample in event.get("samples", []):
            self.say(f"step {event['step']:,} continues {sample['prompt']!r}:\n{sample['prompt']}{sample['text']}")

    def watch(self, items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
        """Pass items through under a progress bar of their own."""
        task = self.progress.add_task(description, total=total, metrics="")
        for item in items:
            yield item
            self.progress.advance(task)
        self.progress.remove_task(task)

    def close(self) -> None:
        """Remove the progress line."""
        self.progress.stop()


def format_metrics(metrics: dict[str, Any]) -> str:
    """Format the metrics of a step for one line of the console."""
    shown = [metric for metric in METRICS if metric.console and metric.key in metrics]
    return "  ".join(metric.console.format(metrics[metric.key]) for metric in shown if metric.console)
