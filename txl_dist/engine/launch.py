"""The processes of a run: who am I, on which device, and what do we all agree on."""

import atexit
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from txl_dist.errors import RunError, UserError, first_line
from txl_dist.placement import Placement, placement

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

    def any(self, mine: bool) -> Callable[[], bool]:
        """Begin to ask whether this holds on any rank; the function returned waits for the answer.

        Every rank must call both. It is asked on the CPU and waits for nothing that a GPU has still to do.
        """
        flag = torch.tensor(int(mine))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(flag)

        return answer


def world(patience: float | None = None) -> World:
    """Join the other processes that a launcher has started, or form a group of one; once in the life of a process.

    Args:
        patience: seconds for which a rank waits for others once they have met, at the least; None: as torch does, 10
            minutes with NCCL.

    Raises:
        UserError: where the launcher's variables are wrong, or the others do not come.
    """
    here = placement()
    device = device_of(here) if torch.cuda.is_available() else torch.device("cpu")
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if patience is not None:  # of the groups that DeepSpeed will make, too
            for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
                setattr(distributed_c10d, name, timedelta(seconds=patience))
        meet(here, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return World(here.rank, here.size, device)


def device_of(here: Placement) -> torch.device:
    """Each process of a machine has a GPU of its own."""
    number, gpus = here.local_rank, torch.cuda.device_count()
    if here.by_srun and gpus == 1:
        return torch.device("cuda", 0)  # srun --gpus-per-task shows each task its own GPU only, under the number 0
    if number >= gpus:
        raise UserError(
            f"{'SLURM_LOCALID' if here.by_srun else 'LOCAL_RANK'}={number}: this machine shows {gpus} GPUs, and every "
            "process needs one of its own; start as many processes as there are GPUs, or hide all GPUs with "
            "CUDA_VISIBLE_DEVICES= to train on CPUs"
        )
    return torch.device("cuda", number)


def meet(here: Placement, backend: str) -> None:
    """Form the process group."""
    patience = float(os.environ.get("TXL_DIST_PATIENCE", "600"))  # seconds
    until = time.monotonic() + patience
    where = {"MASTER_ADDR": here.address, "MASTER_PORT": here.port or free_port()}
    who = {"RANK": here.rank, "WORLD_SIZE": here.size, "LOCAL_RANK": here.local_rank}
    os.environ.update({name: str(value) for name, value in (where | who).items()})  # DeepSpeed reads them, too
    try:
        find_first(here, until)
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=patience)))
        store = dist.PrefixStore(name_of_start(store, here, until), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"RANK={here.rank}: the WORLD_SIZE={here.size} processes did not all come to MASTER_ADDR={here.address}, "
            f"MASTER_PORT={here.port} within {patience:.0f} seconds (TXL_DIST_PATIENCE): {first_line(error)}\n"
            "See whether all of them were started and reach that machine, and whether its port is free"
        ) from error


def leave(code: int = 0) -> NoReturn:
    """End a process that has done, written and said everything, without Python's own shutdown.

    DeepSpeed keeps gloo's threads alive. Once in some fifty runs a finished rank was aborted while Python shut down,
    probably by one of them, and torchrun called the run failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def find_first(here: Placement, until: float) -> None:
    """Wait until the first process is there. torch would wait as well, and print a C++ trace at each try."""
    while True:
        try:
            if here.rank == 0:
                socket.getaddrinfo(here.address, None)
            else:
                socket.create_connection((here.address, here.port), timeout=10).close()
            return
        except OSError as error:
            wait(until, first_line(error))


def name_of_start(store: dist.Store, here: Placement, until: float) -> str:
    """A name for this start of all processes, which none before has had.

    torchrun's store outlives a restart, with the addresses of processes that have died, and on several machines it does
    not tell all the same number of restarts. So each process says hello under a name of its own, and the first one
    answers every hello that it finds until all have come; it may answer the dead, too, of whom nobody reads it.
    """
    if here.rank:
        mine = uuid4().hex
        store.set(f"hello {here.rank}", mine)
        while not store.check([f"answer {mine}"]):
            wait(until, "the first one does not answer")
        start = store.get(f"answer {mine}").decode()
        store.add(f"came {start}", 1)
        return start
    start = uuid4().hex
    while (came := store.add(f"came {start}", 0)) < here.size - 1:
        for hello in (f"hello {rank}" for rank in range(1, here.size)):
            if store.check([hello]):
                store.set(f"answer {store.get(hello).decode()}", start)
        wait(until, f"{came + 1} came")
    return start


def wait(until: float, why: str) -> None:
    """Wait a little for the others, whatever signals come: they would wait in vain for a rank that has left."""
    if time.monotonic() > until:
        raise OSError(why)
    time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
