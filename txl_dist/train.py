"""Train, or resume, a run: `torchrun --nproc_per_node=N -m txl_dist.train +experiment=quickstart`."""

import os
import sys
from typing import TYPE_CHECKING

from txl_dist.distributed.preemption import hold_signals

if TYPE_CHECKING:
    from txl_dist.config.schema import TrainJob


def train(job: "TrainJob") -> None:
    """Train a run from its latest valid checkpoint, or from the beginning, to train.max_steps (or train.stop_at).

    Where a signal stops it, the process exits with the code REQUEUE, and the same command resumes the run.
    """
    from txl_dist.training.run import train_run  # torch and DeepSpeed: seconds to import

    train_run(job)


def main() -> None:
    """Run the command, and end without Python's own shutdown if it has trained."""
    hold_signals()  # before all other imports, so that no signal is lost meanwhile
    # Lost connections are reported in plain words; torch would print a C++ trace of each.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from txl_dist.cli import command
    from txl_dist.config.schema import TrainJob

    command("train", TrainJob, train)
    if "txl_dist.training.run" in sys.modules:  # not after --cfg
        from txl_dist.distributed.process_group import exit_process

        exit_process()


if __name__ == "__main__":
    main()
