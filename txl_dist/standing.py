"""Where a run stands when it is started: at its newest whole checkpoint, if any; and what else its directory holds."""

import os
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from txl_dist.check import continues
from txl_dist.config import TrainJob
from txl_dist.data.index import Index
from txl_dist.engine.checkpoint import Checkpoint, newest
from txl_dist.engine.launch import World
from txl_dist.errors import ConfigError, UserError
from txl_dist.tracking.result import is_tested


def standing(job: TrainJob, index: Index, ranks: World) -> tuple[Checkpoint | None, bool]:
    """The run's newest whole checkpoint, and whether the run is over. The first rank reads all of its files, tells
    which newer checkpoints are damaged, and decides for all ranks.

    Raises:
        ConfigError: on every rank, where none of its checkpoints is whole, or it is of other data or another run.
    """
    checkpoint, over, problems = None, False, []
    if ranks.first:
        try:
            over = is_tested(job)
            checkpoint = newest(job.run.dir, contents=True, tell=lambda damage: print(damage, flush=True))
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
    checkpoint, over, problems = ranks.broadcast((checkpoint, over, problems))
    if problems:
        raise ConfigError(problems)
    return checkpoint, over


def write_run(job: TrainJob, index: Index, ranks: World) -> None:
    """Put beside the checkpoints what a run directory needs to stand alone: its config and its tokenizer.

    Raises:
        RunError: on every rank, where the first one, which writes, cannot.
    """
    run_dir, problems = Path(job.run.dir), []
    if ranks.first:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            partial = run_dir / ".config.partial"
            OmegaConf.save(OmegaConf.create(asdict(job)), partial)
            os.replace(partial, run_dir / "config.yaml")
            index.tokenizer().save(run_dir / "tokenizer")
        except OSError as error:
            problems.append(f"run.dir={job.run.dir}: cannot be written: {error.filename}: {error.strerror}")
    ranks.end_on(problems)
