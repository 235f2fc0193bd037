"""A run of several processes that halts at a certain moment, until a test lets it continue."""

from pathlib import Path

SCRIPT = Path(__file__).with_name("halted_run.py")


class Halt:
    """The moment at which rank 1, or another, calls a function of txl_dist ("module:name") for the Nth time."""

    def __init__(self, folder, where, call, rank=1):
        self.file = folder / "halted"
        self.environment = {"HALT": where, "HALT_CALL": call, "HALT_RANK": rank, "HALT_FILE": self.file}

    def is_reached(self):
        return self.file.exists()

    def release(self):
        self.file.with_suffix(".over").touch()
