"""The processes of a run: who am I, on which device, and what do we all agree on."""

import atexit
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from txl_dist.errors import RunError

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """The process group as one rank sees it."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """The sums of numbers over all ranks, in float64; every rank must call it."""
        total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, problems: list[str]) -> list[str]:
        """The different problems that any rank has found, the same list on each; every rank must call it."""
        gathered: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, problems)
        return list(dict.fromkeys(problem for each in gathered for problem in each))

    def broadcast(self, value: Value) -> Value:
        """The first rank's value, on every rank; every rank must call it."""
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def end_on(self, problems: list[str]) -> None:
        """Go on only where no rank has problems; every rank must call it.

        Raises:
            RunError: on every rank, with the problems of all.
        """
        if any(self.sum(len(problems))):
            raise RunError(self.gather(problems))


def world(patience: float | None = None) -> World:
    """Join the other processes that torchrun has started, or form a group of one; once in the life of a process.

    Args:
        patience: seconds for which a rank waits for others, at the least; None: as torch does, 10 minutes with NCCL.
    """
    gpu = torch.cuda.is_available()
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if not dist.is_initialized():
        if gpu:
            torch.cuda.set_device(device)
        if patience is not None:  # of the groups that DeepSpeed will make, too
            for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
                setattr(distributed_c10d, name, timedelta(seconds=patience))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        atexit.register(dist.destroy_process_group)
    return World(dist.get_rank(), dist.get_world_size(), device)


def leave(code: int = 0) -> NoReturn:
    """End a process that has done, written and said everything, without Python's own shutdown.

    DeepSpeed keeps gloo's threads alive. Once in some fifty runs a finished rank was aborted while Python shut down,
    probably by one of them, and torchrun called the run failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
