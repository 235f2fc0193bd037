"""Which checkpoints of a run are kept."""

import os
import shutil

from txl_dist.checkpoint.format import Checkpoint, directory, steps, valid_checkpoints
from txl_dist.config.schema import CheckpointConfig
from txl_dist.files.atomic import remove


class Retention:
    """Removes the checkpoints of a run that checkpoint.keep_* does not keep.

    A damaged checkpoint never counts as one that is kept. Checkpoints after the last step written are left alone.

    Args:
        start: the step from which this start of the run resumes, 0 at the beginning.
    """

    def __init__(self, run_dir: str, config: CheckpointConfig, start: int):
        self.run_dir = run_dir
        self.config = config
        self.is_valid = {start: True}  # by step: written by this start, or read in full

    def remove_leftovers(self) -> None:
        """Remove what an interrupted start has left half written or half removed."""
        for leftover in directory(self.run_dir, 0).parent.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def apply(self, step: int) -> None:
        """Remove what is not kept, now that the checkpoint of `step` has been written."""
        self.is_valid[step] = True
        existing = [other for other in steps(self.run_dir) if other <= step]
        for unneeded in set(existing) - self.kept(existing):
            path = directory(self.run_dir, unneeded)
            removed = path.with_name(f".{path.name}.removed")
            os.replace(path, removed)  # first, so that a directory with a final name is complete
            remove(removed)

    def kept(self, existing: list[int]) -> set[int]:
        """Return the steps to keep among those of existing checkpoints, given in ascending order."""
        config = self.config
        checkpoints = list(valid_checkpoints(self.run_dir, existing))
        kept = set(self.first_valid(checkpoints[::-1], config.keep_last))
        if config.keep_every:
            kept |= {checkpoint.step for checkpoint in checkpoints if checkpoint.step % config.keep_every == 0}
        if config.keep_best:
            evaluated = [checkpoint for checkpoint in checkpoints if checkpoint.valid_loss is not None]
            evaluated.sort(key=lambda checkpoint: (checkpoint.valid_loss, checkpoint.step))
            kept |= set(self.first_valid(evaluated, 1))
        return kept

    def first_valid(self, checkpoints: list[Checkpoint], count: int) -> list[int]:
        """Return the steps of the first `count` checkpoints whose contents are valid.

        Contents are read at most once per start, and only as far as the answer needs it.
        """
        chosen: list[int] = []
        for checkpoint in checkpoints:
            if len(chosen) == count:
                break
            if checkpoint.step not in self.is_valid:
                self.is_valid[checkpoint.step] = not checkpoint.validate()
            if self.is_valid[checkpoint.step]:
                chosen.append(checkpoint.step)
        return chosen
