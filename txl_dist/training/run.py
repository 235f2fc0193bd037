"""One command that trains: the processes agree, find where the run resumes, and train until it ends or is stopped."""

import gc
import sys
from typing import NoReturn

from txl_dist.checkpoint.format import Checkpoint
from txl_dist.config.schema import TrainJob
from txl_dist.data.index import Index
from txl_dist.distributed.logs import RunLog
from txl_dist.distributed.preemption import REQUEUE, Preempted, Preemption, pending
from txl_dist.distributed.process_group import ProcessGroup, exit_process, process_group
from txl_dist.distributed.watchdog import Watchdog
from txl_dist.errors import ConfigError
from txl_dist.files.lock import Lock
from txl_dist.runs.resume import find_resume_point, run_locked
from txl_dist.tracking.result import show_result
from txl_dist.training.loop import Training
from txl_dist.training.out_of_memory import out_of_memory_reported


def train_run(job: TrainJob) -> None:
    """Train a run from its latest valid checkpoint, or from the beginning, to train.max_steps (or train.stop_at).

    Where a signal stops it, the process exits with the code REQUEUE.

    Raises:
        ConfigError: on every rank, where the config has a problem on any rank, or the run cannot be resumed with it.
        RunError: on every rank, where training cannot continue, as on a full disk or after a bad step.
    """
    with RunLog(job.run.dir), Watchdog(job.guard.stall_timeout) as watchdog:
        group = process_group(watchdog.patience)
        # Ranks whose config is right wait here for those whose config is not, as where data are not on their host.
        problems = group.gather([])
        if problems:
            raise ConfigError(problems)
        watchdog.start(group)
        index = Index.open(job.data.dir)
        preemption = Preemption(group)
        try:
            with run_locked(job, group, preemption) as lock:
                nothing_to_do = train_to_end(job, index, group, watchdog, preemption, lock)
                preemption.finish()
                if nothing_to_do and group.is_rank_zero:
                    print(f"{job.run.dir}: {nothing_to_do}; nothing to do", flush=True)
                elif group.is_rank_zero:
                    show_result(job, index.splits)
        except Preempted as position:
            exit_preempted(position, group)


def train_to_end(
    job: TrainJob, index: Index, group: ProcessGroup, watchdog: Watchdog, preemption: Preemption, lock: Lock | None
) -> str | None:
    """Train until the run has come to its end, resuming it again after each rollback.

    Returns:
        Why there is nothing to do, where its checkpoint lies beyond the end.
    """
    while True:
        gc.collect()  # the engine that was rolled back, which refers to itself
        checkpoint, is_over = find_resume_point(job, index, group)
        beyond_end = None if is_over else describe_beyond_end(job, checkpoint)
        if beyond_end:
            return beyond_end
        preemption.ask("before the model was built")
        if is_over:
            return None
        with out_of_memory_reported(job, group):
            if Training(job, index, checkpoint, group, watchdog, preemption, lock).run():
                return None


def describe_beyond_end(job: TrainJob, checkpoint: Checkpoint | None) -> str | None:
    """Say which end of training a checkpoint lies beyond; None where it lies beyond neither."""
    step = checkpoint.step if checkpoint else 0
    for key, end in (("train.max_steps", job.train.max_steps), ("train.stop_at", job.train.stop_at)):
        if end is not None and step > end:
            return f"is at step {step:,}, beyond {key}={end}"
    return None


def exit_preempted(position: Preempted, group: ProcessGroup) -> NoReturn:
    """Say by which signals and where the run was stopped, and end all ranks with the code REQUEUE."""
    signals = " and ".join(group.gather(pending()))
    if group.is_rank_zero:
        message = f"Stopped by {signals} {position}; the same command resumes from there (exit code {REQUEUE})."
        print(message, file=sys.stderr, flush=True)
    group.gather([])  # launchers end all ranks as soon as one has ended: none may before this is printed
    exit_process(REQUEUE)
