"""Where a run resumes: its lock, its latest valid checkpoint, and what else its directory holds."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from txl_dist.checkpoint.format import Checkpoint, latest
from txl_dist.config.identity import refused_changes
from txl_dist.config.schema import TrainJob
from txl_dist.data.index import Index
from txl_dist.distributed.launcher import patience
from txl_dist.distributed.preemption import Preemption, is_stopping, pending
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.atomic import atomic_file, make_folder
from txl_dist.files.lock import InUse, Lock, acquire
from txl_dist.files.owner import Owner
from txl_dist.runs.finished import finished_step, unmark_finished, writing_to

log = logging.getLogger(__name__)

RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")  # above 0: another process may have run this before


@contextmanager
def run_locked(job: TrainJob, group: ProcessGroup, preemption: Preemption) -> Iterator[Lock | None]:
    """Hold the lock of the run directory, on rank zero. Every rank must enter.

    A start that was requeued, or restarted by its launcher, waits for the one before it, which may still be saving. So
    does any start if that one has received a signal to stop.

    Raises:
        ConfigError: on every rank, if another start is training the run.
        RunError: on every rank, if the run directory cannot be written.
        Preempted: on every rank, if a signal came in the meantime.
    """
    preemption.ask("before the model was built")
    lock: Lock | None = None
    rival = ""
    try:
        with writing_to(job.run.dir, group):
            if group.is_rank_zero:
                try:
                    make_folder(Path(job.run.dir))
                    lock = acquire(Path(job.run.dir) / ".lock", "training", patiently(job))
                except InUse as error:
                    rival = f"run.dir={job.run.dir}: {error}; wait until it has ended, or give another run.dir"
        preemption.ask("before the model was built")
        rival = group.broadcast(rival)
        if rival:
            raise ConfigError([rival])
        yield lock
    finally:
        if lock:
            lock.release()


def patiently(job: TrainJob) -> Callable[[Owner | None], bool]:
    """Return the function that `acquire` asks, again and again, whether to wait for the owner of the run's lock."""
    restarted = any(os.environ.get(name, "0") not in ("", "0") for name in RESTARTS)
    stall = job.guard.stall_timeout
    deadline = time.monotonic() + (patience() if stall is None else min(patience(), stall / 2))

    def wait(owner: Owner | None) -> bool:
        is_ending = restarted or (owner is not None and owner.is_local and is_stopping(owner.pid))
        return is_ending and time.monotonic() < deadline and not pending()

    return wait


def find_resume_point(job: TrainJob, index: Index, group: ProcessGroup) -> tuple[Checkpoint | None, bool]:
    """Return the run's latest valid checkpoint, None at the beginning, and whether the run is finished.

    Rank zero reads all files of the checkpoint, logs which later ones are damaged, and decides for all ranks.

    Raises:
        ConfigError: on every rank, if the run has checkpoints but none is valid, or the checkpoint belongs to other
            data or to a run with another config.
    """
    checkpoint = None
    last_step = None
    is_finished = False
    problems: list[str] = []
    if group.is_rank_zero:
        try:
            last_step = finished_step(job.run.dir)
            checkpoint = latest(job.run.dir, contents=True, report=log.warning)
        except UserError as error:
            problems = str(error).splitlines()
        if checkpoint:
            is_finished = checkpoint.step == job.train.max_steps == last_step
            problems = resume_problems(job, index, checkpoint)
    checkpoint, is_finished, problems = group.broadcast((checkpoint, is_finished, problems))
    if problems:
        raise ConfigError(problems)
    return checkpoint, is_finished


def resume_problems(job: TrainJob, index: Index, checkpoint: Checkpoint) -> list[str]:
    """Say why a run cannot resume from a checkpoint; empty if it can.

    The config was compared with a checkpoint before, but with one that was valid as far as sizes show.
    """
    problems: list[str] = []
    if checkpoint.data["fingerprint"] != index.fingerprint:
        problems.append(
            f"data.dir={job.data.dir}: is not what the run in {job.run.dir} was started with "
            f"(fingerprint {index.fingerprint[:12]}, not {checkpoint.data['fingerprint'][:12]}); "
            "give that data, or another run.dir for another run"
        )
    sections = (job.run, job.data, job.model, job.optimizer, job.objective, job.train)
    problems += refused_changes(checkpoint.config, *sections)
    return problems


def write_run(job: TrainJob, index: Index, group: ProcessGroup) -> None:
    """Write the run's config and tokenizer to its directory, so that it stands alone; it is no longer finished.

    Raises:
        RunError: on every rank, if rank zero cannot write them.
    """
    run_dir = Path(job.run.dir)
    with writing_to(job.run.dir, group):
        if group.is_rank_zero:
            run_dir.mkdir(parents=True, exist_ok=True)
            unmark_finished(job.run.dir)
            with atomic_file(run_dir / "config.yaml") as temporary:
                OmegaConf.save(OmegaConf.create(asdict(job)), temporary)
            index.tokenizer().save(run_dir / "tokenizer")
