"""Saving in the background: training waits for a copy of the tensors in CPU memory, a thread writes the copy.

    training   step 500 | copy |  step 501   step 502   step 503 ...
    thread                     write, hash, flush | wait for all ranks' files | manifest, rename, retention | outcome

The ranks' threads agree through a process group of their own, so they never mix with the collectives of training.
"""

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from txl_dist.checkpoint.format import CheckpointWriter, FileEntries, steps, valid_checkpoints
from txl_dist.checkpoint.retention import Retention
from txl_dist.config.schema import CheckpointConfig
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.errors import RunError, describe_os_error

log = logging.getLogger(__name__)


class AsyncCheckpointer:
    """Writes the checkpoints of one start of a run in the background, one at a time.

    It is a context manager that all ranks enter together; leaving it waits for what is still being written.

    Args:
        start: the step from which this start of the run resumes, 0 at the beginning.
    """

    def __init__(self, run_dir: str, config: CheckpointConfig, start: int, group: ProcessGroup):
        self.run_dir = run_dir
        self.group = group
        self.retention = Retention(run_dir, config, start)
        self.thread = ThreadPoolExecutor(1, "checkpoint")  # not a daemon: Python's shutdown waits for it
        self.pending: Future[list[str]] | None = None

    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        config: dict[str, Any],
        data: dict[str, Any],
    ) -> None:
        """Begin to write a checkpoint. Every rank must call it with its share of the tensors.

        Args:
            tensors: kind -> name -> tensor; they must not be changed any more.

        Raises:
            RunError: on every rank, if the save before this one has failed on any rank.
        """
        self.wait()
        writer = CheckpointWriter(self.run_dir, step, self.group.rank)
        self.pending = self.thread.submit(self._write, writer, step, tensors, state, config, data)

    @property
    def problems(self) -> list[str]:
        """Return what went wrong with the last save, as far as it is known by now."""
        return self.pending.result() if self.pending and self.pending.done() else []

    def wait(self) -> None:
        """Wait until the last checkpoint has its final name. Every rank must call it.

        Raises:
            RunError: on every rank, if the save has failed on any rank.
        """
        if self.pending:
            problems = self.pending.result()
            self.pending = None
            if problems:
                raise RunError(problems)

    def __enter__(self) -> "AsyncCheckpointer":
        if self.group.is_rank_zero:
            self.retention.remove_leftovers()
        self.write_group = dist.new_group(backend="gloo")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except RunError as failure:
            if kind is None:
                raise
            if kind is not RunError and self.group.is_rank_zero:  # a RunError says it already
                log.error(str(failure))
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
        """Write this rank's files, have rank zero commit all of them, and return the problems of all ranks.

        It runs in the background thread of every rank.
        """
        problems: list[str] = []
        with failure_noted(problems, step):
            for kind, named in tensors.items():
                writer.add(kind, named)
        written: list[tuple[FileEntries, list[str]]] = [({}, [])] * self.group.size
        dist.all_gather_object(written, (writer.files, problems), group=self.write_group)
        files: FileEntries = {}
        problems = []
        for rank_files, rank_problems in written:
            files |= rank_files
            problems += [problem for problem in rank_problems if problem not in problems]
        if self.group.is_rank_zero:
            if not problems:
                with failure_noted(problems, step):
                    writer.commit(files, state, config, data)
                    self.retention.apply(step)
            if problems:
                writer.discard()
                problems.append(self._remedy())
        outcome = [problems]
        dist.broadcast_object_list(outcome, src=0, group=self.write_group)
        return outcome[0]

    def _remedy(self) -> str:
        existing = reversed(steps(self.run_dir))
        last = next(valid_checkpoints(self.run_dir, existing), None)
        if last:
            origin = f"from step {last.step:,}, its latest valid checkpoint"
        else:
            origin = "from the beginning, because it has no checkpoint"
        return f"{self.run_dir}: once that is mended, the same command resumes {origin}"


@contextlib.contextmanager
def failure_noted(problems: list[str], step: int) -> Iterator[None]:
    """Add the failure of a save to `problems`. Any exception: the other ranks wait to hear of it."""
    try:
        yield
    except OSError as error:
        problems.append(f"the checkpoint of step {step:,} could not be saved: {describe_os_error(error)}")
    except Exception as error:
        problems.append(f"the checkpoint of step {step:,} could not be saved: {type(error).__name__}: {error}")
