"""The damaged samples that training drops, with data.on_error=skip_sample."""

from txl_dist.data.samples import SampleReader
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.tracking.console import ConsoleReporter


class DroppedSamples:
    """Reports damaged samples, each once in a start of a run, and counts their tokens.

    Attributes:
        tokens: that all ranks have dropped since the last reading.
    """

    def __init__(self, reader: SampleReader | None, group: ProcessGroup, reporter: ConsoleReporter):
        self.reader = reader
        self.group = group
        self.reporter = reporter
        self.tokens = 0
        self._reported: set[str] = set()

    def read(self) -> dict[str, int]:
        """Return the dropped tokens as a metric, and report newly found damage; every rank must call it."""
        if self.reader is None or self.reader.fill_value is None:
            return {}
        if self.tokens:  # the same on every rank
            for damage in self.group.gather(list(self.reader.damaged.values())):
                if damage not in self._reported:
                    self.reporter.say(f"skipped {damage}")
                    self._reported.add(damage)
        tokens = self.tokens
        self.tokens = 0
        return {"train/skipped_tokens": tokens}
