"""What training skips, with data.on_error=skip_sample."""

from txl_dist.data.samples import SampleReader
from txl_dist.engine.launch import World
from txl_dist.tracking.console import Screen


class Skipped:
    """Tells of damaged samples, each once in a start of a run. tokens: that all ranks have skipped since last read."""

    def __init__(self, reader: SampleReader, world: World, screen: Screen):
        self.reader, self.world, self.screen = reader, world, screen
        self.tokens, self.told = 0, set[str]()

    def read(self) -> dict[str, int]:
        """The count as a metric; samples that any rank has found damaged are told. Every rank must call it."""
        if self.reader.lost is None:
            return {}
        if self.tokens:  # the same on every rank
            for damage in self.world.gather(list(self.reader.damaged.values())):
                if damage not in self.told:
                    self.screen.say(f"skipped {damage}")
                    self.told.add(damage)
        tokens, self.tokens = self.tokens, 0
        return {"train/skipped_tokens": tokens}
