"""Advice for a run that has no memory left."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from txl_dist.config.schema import TrainJob
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.errors import UserError, describe_os_error, first_line
from txl_dist.tracking.profile import write_memory_snapshot


@contextlib.contextmanager
def out_of_memory_reported(job: TrainJob, group: ProcessGroup) -> Iterator[None]:
    """Turn torch's lack of memory into advice; on a GPU write what its memory holds beside the profile.

    Raises:
        UserError: where there is not enough memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        engine = job.engine
        lines = [
            f"rank {group.rank} has no memory left on {group.device}: {first_line(error)}",
            f"Less is taken by a larger engine.gradient_accumulation than {engine.gradient_accumulation}, a higher "
            f"engine.zero_stage than {engine.zero_stage} with several processes, engine.activation_checkpointing=true, "
            "engine.offload=optimizer and more engine.pipeline_stages; the run stays the same.",
        ]
        if group.device.type == "cuda":
            lines.append(write_snapshot(Path(job.run.dir, "profile"), group.rank))
        raise UserError("\n".join(lines)) from error


def write_snapshot(folder: Path, rank: int) -> str:
    """Write what this GPU's memory holds, and say where; or why that could not be written."""
    try:
        path = write_memory_snapshot(folder, f"out-of-memory-rank-{rank}")
    except OSError as error:
        return f"What the memory held could not be written: {describe_os_error(error, folder)}"
    return f"What the memory held is in {path}, for pytorch.org/memory_viz."
