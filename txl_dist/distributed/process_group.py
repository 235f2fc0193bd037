"""The processes of a run: who am I, on which device, and what do we all agree on."""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import NoReturn, TypeVar
from uuid import uuid4

import psutil
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from txl_dist.distributed.launcher import RankInfo, launcher_env, patience
from txl_dist.distributed.peers import Peer, Peers, introduce, is_loopback, ranks
from txl_dist.errors import RunError, UserError, first_line, format_error

Value = TypeVar("Value")

GRACE = 5  # seconds beyond its patience after which a process that still meets the others is ended


@dataclass(frozen=True)
class ProcessGroup:
    """The process group as one rank sees it."""

    rank: int
    size: int
    device: torch.device
    peers: Peers

    @property
    def is_rank_zero(self) -> bool:
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
        format_error = [value]
        dist.broadcast_object_list(format_error, src=0)
        return format_error[0]

    def raise_if_any_failed(self, problems: list[str]) -> None:
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


joined: list[ProcessGroup] = []  # the one process group of this process, once it is formed


def process_group(patience: float | None = None) -> ProcessGroup:
    """Join the other processes that a launcher has started, or form a group of one; once in the life of a process.

    Args:
        patience: seconds for which a rank waits for others once they have met, at the least; None: as torch does, 10
            minutes with NCCL.

    Raises:
        UserError: where the launcher's variables are wrong, or the others do not come.
    """
    if not joined:
        here = launcher_env()
        device = device_of(here) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if patience is not None:  # of the groups that DeepSpeed will make, too
            for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
                setattr(distributed_c10d, name, timedelta(seconds=patience))
        peers = meet(here, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        joined.append(ProcessGroup(here.rank, here.size, device, peers))
    return joined[0]


def device_of(here: RankInfo) -> torch.device:
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


def meet(here: RankInfo, backend: str) -> Peers:
    """Form the process group, and learn who the others are."""
    seconds = patience()
    until = time.monotonic() + seconds
    where = {"MASTER_ADDR": here.address, "MASTER_PORT": here.port or free_port()}
    who = {"RANK": here.rank, "WORLD_SIZE": here.size, "LOCAL_RANK": here.local_rank}
    os.environ.update({name: str(value) for name, value in (where | who).items()})  # DeepSpeed reads them, too
    peers = Peers(here.rank, [])

    def apart(why: str) -> UserError:
        return UserError(
            f"RANK={here.rank}: the WORLD_SIZE={here.size} processes did not all come to MASTER_ADDR={here.address}, "
            f"MASTER_PORT={here.port} within {seconds:.0f} seconds (TXL_DIST_PATIENCE): {why}\n"
            "See whether all of them were started and reach that machine, and whether its port is free"
        )

    def give_up() -> None:
        """End a process that waits for an answer which will not come: torch's store waits for ever."""
        gone = peers.missing() or ["the first one does not answer" if here.rank else "the others do not answer"]
        print(format_error(apart("; ".join(gone))), file=sys.stderr, flush=True)
        exit_process(2)

    try:
        with time_limit(seconds + GRACE, give_up):
            mine, first = find_first(here, until)
            store = open_store(here, seconds)
            me = introduce(here.rank, mine)
            start, everyone = greet(store, me, first, here.size, until)
            peers.all.extend(everyone)
            choose_interface(peers.all[here.rank].address)
            store = dist.PrefixStore(start, store)
            dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size)
    except (OSError, RuntimeError) as error:
        raise apart("; ".join([*peers.missing(), first_line(error)])) from error
    return peers


@contextlib.contextmanager
def time_limit(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Act, in a thread, if what is done in this context takes longer."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def exit_process(code: int = 0) -> NoReturn:
    """End a process that has done, written and said everything, without Python's own shutdown.

    DeepSpeed keeps gloo's threads alive. Once in some fifty runs a finished rank was aborted while Python shut down,
    probably by one of them, and torchrun called the run failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def find_first(here: RankInfo, until: float) -> tuple[str, str]:
    """Wait until the first process is there. torch would wait as well, and print a C++ trace at each try.

    Returns:
        The addresses of this process and of the first, as they see each other.
    """
    while True:
        try:
            if here.rank == 0:
                address = str(socket.getaddrinfo(here.address, None)[0][4][0])
                return address, address
            with socket.create_connection((here.address, here.port), timeout=10) as connection:
                return connection.getsockname()[0], connection.getpeername()[0]
        except OSError as error:
            wait(until, first_line(error))


def open_store(here: RankInfo, patience: float) -> dist.Store:
    """Open the store in which the processes meet: the first one's or, under torchrun, its own."""
    theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        here.address,
        int(os.environ["MASTER_PORT"]),
        here.size,
        is_master=here.rank == 0 and not theirs,
        timeout=timedelta(seconds=patience),
        wait_for_workers=False,  # they greet each other, and know then who is missing
        multi_tenant=True,
    )


def greet(store: dist.Store, me: Peer, first: str, size: int, until: float) -> tuple[str, list[Peer]]:
    """Agree on a name for this start of all processes, which none before has had, and learn who they are.

    torchrun's store outlives a restart, with the addresses of processes that have died, and on several machines it does
    not tell all the same number of restarts. So each process says hello under a name of its own, and the first one
    answers every hello that it finds until all have come; it may answer the dead, too, of whom nobody reads it.

    Args:
        first: the first one's address as this process sees it.
    """
    if me.rank:
        mine = uuid4().hex
        store.set(f"hello {me.rank}", json.dumps([mine, first, asdict(me)]))
        wait_for(store, f"answer {mine}", until)
        start = store.get(f"answer {mine}").decode()
        store.add(f"came {start}", 1)
        wait_for(store, f"all {start}", until)
        return start, [Peer(**each) for each in json.loads(store.get(f"all {start}"))]
    start = uuid4().hex
    while (came := store.add(f"came {start}", 0)) < size - 1:
        silent = []
        for rank in range(1, size):
            if store.check([f"hello {rank}"]):
                store.set(f"answer {json.loads(store.get(f'hello {rank}'))[0]}", start)
            else:
                silent.append(rank)
        wait(until, f"{ranks(silent)} did not come" if silent else f"{came + 1} came")
    hellos = [json.loads(store.get(f"hello {rank}")) for rank in range(1, size)]
    everyone = addressed([me, *(Peer(**hello[2]) for hello in hellos)], [hello[1] for hello in hellos])
    store.set(f"all {start}", json.dumps([asdict(peer) for peer in everyone]))
    return start, everyone


def addressed(peers: list[Peer], first: list[str]) -> list[Peer]:
    """Give each process an address that all can reach.

    On its own host the first one may be known by a loopback address only, as 127.0.1.1 on Debian, to itself and its
    neighbours; the other hosts have reached it by another.

    Args:
        first: its addresses as the others see it.
    """
    outer = [address for address in [peers[0].address, *first] if not is_loopback(address)]
    return [replace(peer, address=outer[0]) if outer and is_loopback(peer.address) else peer for peer in peers]


def choose_interface(address: str) -> None:
    """Have gloo use the network on which the processes have met, unless the user has chosen one.

    By itself it takes the one that the host's name stands for: on many hosts the loopback, where no other host comes.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses) and not os.environ.get("GLOO_SOCKET_IFNAME"):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def wait_for(store: dist.Store, key: str, until: float) -> None:
    while not store.check([key]):
        wait(until, "the first one does not answer")


def wait(until: float, why: str) -> None:
    """Wait a little for the others, whatever signals come: they would wait in vain for a rank that has left."""
    if time.monotonic() > until:
        raise OSError(why)
    time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
