"""Saving in the background: training waits for a copy of the tensors in the CPU's memory, a thread writes the copy.

    training   step 500 | copy |  step 501   step 502   step 503 ...
    thread                     write, hash, flush | all ranks' files are there | manifest, rename, retention | told

The ranks' threads agree through a process group of their own: training's collectives are never theirs.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from txl_dist.checkpoint.format import Checkpoint, CheckpointWriter, Files, directory, steps, whole
from txl_dist.config.schema import CheckpointConfig
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.errors import RunError, describe_os_error
from txl_dist.files.atomic import remove


class AsyncCheckpointer:
    """Writes the checkpoints of one start of a run, one at a time, within its context; all ranks enter it together.

    The context ends with `wait`: what was begun is written before a process leaves.

    Args:
        start: the step of the checkpoint that this start goes on from, 0 where there is none.
    """

    def __init__(self, run_dir: str, config: CheckpointConfig, start: int, group: ProcessGroup):
        self.run_dir, self.group = run_dir, group
        self.retention = Retention(run_dir, config, start)
        self.thread = ThreadPoolExecutor(1, "checkpoint")  # no daemon: Python's end waits for it
        self.pending: Future[list[str]] | None = None

    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        config: dict[str, Any],
        data: dict[str, Any],
    ) -> None:
        """Begin to write a checkpoint. Every rank must call it, each with its share.

        Args:
            tensors: kind -> name -> tensor; nobody may change them any more.

        Raises:
            RunError: as `wait`.
        """
        self.wait()
        writer = CheckpointWriter(self.run_dir, step, self.group.rank)
        self.pending = self.thread.submit(self._write, writer, step, tensors, state, config, data)

    @property
    def problems(self) -> list[str]:
        """What has gone wrong with the last save, as far as this rank knows by now."""
        return self.pending.result() if self.pending and self.pending.done() else []

    def wait(self) -> None:
        """Wait until what was begun bears its name. Every rank must call it.

        Raises:
            RunError: where any rank could not do its part; on all ranks.
        """
        if self.pending:
            problems = self.pending.result()
            self.pending = None
            if problems:
                raise RunError(problems)

    def __enter__(self) -> "AsyncCheckpointer":
        if self.group.is_rank_zero:
            self.retention.sweep()
        self.write_group = dist.new_group(backend="gloo")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except RunError as failure:
            if kind is None:
                raise
            if kind is not RunError and self.group.is_rank_zero:
                print(failure, file=sys.stderr)
        finally:
            self.thread.shutdown()
            dist.destroy_process_group(self.write_group)

    def _write(
        self,
        writer: CheckpointWriter,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        config: dict[str, Any],
        data: dict[str, Any],
    ) -> list[str]:
        """What the thread does; returns what has gone wrong on any rank."""
        problems: list[str] = []
        with noted(problems, step):
            for kind, each in tensors.items():
                writer.add(kind, each)
        written: list[tuple[Files, list[str]]] = [({}, [])] * self.group.size
        dist.all_gather_object(written, (writer.files, problems), group=self.write_group)
        problems = list(dict.fromkeys(chain.from_iterable(each for _, each in written)))
        if self.group.is_rank_zero:
            if not problems:
                with noted(problems, step):
                    writer.commit(
                        {name: told for files, _ in written for name, told in files.items()}, state, config, data
                    )
                    self.retention.apply(step)
            if problems:
                writer.give_up()
                problems.append(self._remedy())
        told = [problems]
        dist.broadcast_object_list(told, src=0, group=self.write_group)
        return told[0]

    def _remedy(self) -> str:
        last = next(whole(self.run_dir, reversed(steps(self.run_dir))), None)
        since = (
            f"from step {last.step:,}, its last whole checkpoint"
            if last
            else "from its beginning: it has no checkpoint"
        )
        return f"{self.run_dir}: with that mended, the same command goes on {since}"


@contextlib.contextmanager
def noted(problems: list[str], step: int) -> Iterator[None]:
    """Turn a failure into words. Of any kind: the other ranks wait to hear of it."""
    try:
        yield
    except OSError as error:
        problems.append(f"the checkpoint of step {step:,} could not be saved: {describe_os_error(error)}")
    except Exception as error:
        problems.append(f"the checkpoint of step {step:,} could not be saved: {type(error).__name__}: {error}")


class Retention:
    """Which checkpoints of a run stay. Damaged ones never count; those after the last step written are left alone.

    Args:
        start: the step that this start goes on from.
    """

    def __init__(self, run_dir: str, config: CheckpointConfig, start: int):
        self.run_dir, self.config = run_dir, config
        self.whole = {start: True}  # of steps whose contents have been read, or written here

    def sweep(self) -> None:
        """Remove what an interrupted start has left half-written or half-removed."""
        for left in directory(self.run_dir, 0).parent.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def apply(self, step: int) -> None:
        """Remove what shall not stay, now that the checkpoint of `step` is there."""
        self.whole[step] = True
        found = [each for each in steps(self.run_dir) if each <= step]
        for each in set(found) - self.kept(found):
            path = directory(self.run_dir, each)
            aside = path.with_name(f".{path.name}.removed")
            os.replace(path, aside)  # it is whole or it is gone
            remove(aside)

    def kept(self, found: list[int]) -> set[int]:
        config = self.config
        checkpoints = list(whole(self.run_dir, found))  # as far as manifests and sizes tell
        kept = {each.step for each in islice(filter(self.is_whole, reversed(checkpoints)), config.keep_last)}
        if config.keep_every:
            kept |= {each.step for each in checkpoints if each.step % config.keep_every == 0}
        if config.keep_best:
            evaluated = [each for each in checkpoints if each.valid_loss is not None]
            ordered = sorted(evaluated, key=lambda each: (each.valid_loss, each.step))
            kept |= {each.step for each in islice(filter(self.is_whole, ordered), 1)}
        return kept

    def is_whole(self, checkpoint: Checkpoint) -> bool:
        """Its contents are read once in a start, and only where it matters."""
        if checkpoint.step not in self.whole:
            self.whole[checkpoint.step] = not checkpoint.validate()
        return self.whole[checkpoint.step]
