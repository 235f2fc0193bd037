"""What training skips, with data.on_error=skip_sample."""

from txl_dist.data.samples import SampleReader
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.tracking.console import ConsoleReporter


class DroppedSamples:
    """Tells of damaged samples, each once in a start of a run. tokens: that all ranks have skipped since last read."""

    def __init__(self, reader: SampleReader, group: ProcessGroup, reporter: ConsoleReporter):
        self.reader, self.group, self.reporter = reader, group, reporter
        self.tokens, self.told = 0, set[str]()

    def read(self) -> dict[str, int]:
        """The count as a metric; samples that any rank has found damaged are told. Every rank must call it."""
        if self.reader.fill_value is None:
            return {}
        if self.tokens:  # the same on every rank
            for damage in self.group.gather(list(self.reader.damaged.values())):
                if damage not in self.told:
                    self.reporter.say(f"skipped {damage}")
                    self.told.add(damage)
        tokens, self.tokens = self.tokens, 0
        return {"train/skipped_tokens": tokens}
