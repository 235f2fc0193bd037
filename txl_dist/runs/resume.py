"""Where a run stands when it is started: at its newest whole checkpoint, if any; and what else its directory holds."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from txl_dist.checkpoint.format import Checkpoint, latest
from txl_dist.config.checks import continues
from txl_dist.config.schema import TrainJob
from txl_dist.data.index import Index
from txl_dist.distributed.launcher import patience
from txl_dist.distributed.preemption import Preemption, pending
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.errors import ConfigError, UserError, describe_os_error
from txl_dist.files.atomic import atomic_file, make_folder
from txl_dist.files.lock import InUse, Lock, acquire
from txl_dist.files.owner import Owner
from txl_dist.tracking.result import is_tested

RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")  # above 0: another process may have run this before


@contextmanager
def run_locked(job: TrainJob, group: ProcessGroup, preemption: Preemption) -> Iterator[Lock | None]:
    """Hold the lock of the run directory, on the first rank; every rank must enter.

    A start that was requeued, or that a launcher has made anew, waits for the one before it, which may still be saving;
    so does any start where that one has got a signal to stop.

    Raises:
        ConfigError: on every rank, where another start is training the run.
        RunError: on every rank, where the run directory cannot be written.
        Preempted: on every rank, where a signal came in the meantime.
    """
    preemption.ask("before the model was built")
    lock: Lock | None = None
    problems: list[str] = []
    rival = ""
    if group.is_rank_zero:
        try:
            make_folder(Path(job.run.dir))
            lock = acquire(Path(job.run.dir) / ".lock", "training", patiently(job))
        except InUse as error:
            rival = f"run.dir={job.run.dir}: {error}; wait until it has ended, or give another run.dir"
        except OSError as error:
            problems.append(f"run.dir={job.run.dir}: cannot be written: {describe_os_error(error, job.run.dir)}")
    try:
        group.raise_if_any_failed(problems)
        preemption.ask("before the model was built")
        if rival := group.broadcast(rival):
            raise ConfigError([rival])
        yield lock
    finally:
        if lock:
            lock.release()


def patiently(job: TrainJob) -> Callable[[Owner | None], bool]:
    """Return whether to wait for the owner of a run's lock, as `acquire` asks again and again."""
    restarted = any(os.environ.get(name, "0") not in ("", "0") for name in RESTARTS)
    stall = job.guard.stall_timeout
    until = time.monotonic() + (patience() if stall is None else min(patience(), stall / 2))

    def wait(owner: Owner | None) -> bool:
        ending = restarted or (owner is not None and owner.is_stopping())
        return ending and time.monotonic() < until and not pending()

    return wait


def find_resume_point(job: TrainJob, index: Index, group: ProcessGroup) -> tuple[Checkpoint | None, bool]:
    """The run's newest whole checkpoint, and whether the run is over. The first rank reads all of its files, tells
    which newer checkpoints are damaged, and decides for all ranks.

    Raises:
        ConfigError: on every rank, where none of its checkpoints is whole, or it is of other data or another run.
    """
    checkpoint, over, problems = None, False, []
    if group.is_rank_zero:
        try:
            over = is_tested(job)
            checkpoint = latest(job.run.dir, contents=True, tell=lambda damage: print(damage, flush=True))
        except UserError as error:
            problems = str(error).splitlines()
        if checkpoint:
            over = over and checkpoint.step >= job.train.max_steps  # else its last one is lost
            if checkpoint.data["fingerprint"] != index.fingerprint:
                problems.append(
                    f"data.dir={job.data.dir}: is not what the run in {job.run.dir} was started with "
                    f"(fingerprint {index.fingerprint[:12]}, not {checkpoint.data['fingerprint'][:12]}); "
                    "give that data, or another run.dir for another run"
                )
            # Checked before, but of what sizes alone took for whole.
            problems += continues(checkpoint.config, job.run, job.data, job.model, job.optimizer)
    checkpoint, over, problems = group.broadcast((checkpoint, over, problems))
    if problems:
        raise ConfigError(problems)
    return checkpoint, over


def write_run(job: TrainJob, index: Index, group: ProcessGroup) -> None:
    """Put beside the checkpoints what a run directory needs to stand alone: its config and its tokenizer.

    Raises:
        RunError: on every rank, where the first one, which writes, cannot.
    """
    run_dir, problems = Path(job.run.dir), []
    if group.is_rank_zero:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            with atomic_file(run_dir / "config.yaml") as temporary:
                OmegaConf.save(OmegaConf.create(asdict(job)), temporary)
            index.tokenizer().save(run_dir / "tokenizer")
        except OSError as error:
            problems.append(f"run.dir={job.run.dir}: cannot be written: {describe_os_error(error, run_dir)}")
    group.raise_if_any_failed(problems)
