"""The process group: which rank this process is, on which device, and how all ranks agree."""

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
from itertools import chain
from typing import NoReturn, TypeVar
from uuid import uuid4

import psutil
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from txl_dist.distributed.launcher import RankInfo, launcher_env, patience
from txl_dist.distributed.logs import log_exit
from txl_dist.distributed.peers import Peer, Peers, format_ranks, is_loopback, listen
from txl_dist.errors import RunError, UserError, first_line, format_error

Value = TypeVar("Value")

GRACE = 5  # seconds beyond its patience after which a process that still waits for the others is ended


@dataclass(frozen=True)
class ProcessGroup:
    """The process group as one rank sees it."""

    rank: int
    size: int
    device: torch.device
    peers: Peers

    @property
    def is_rank_zero(self) -> bool:
        """Return whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Add up each number over all ranks, in float64. Every rank must call it."""
        total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, problems: list[str]) -> list[str]:
        """Return the different problems of all ranks, the same list on each. Every rank must call it."""
        return list(dict.fromkeys(chain.from_iterable(self.all_gather(problems))))

    def all_gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in their order. Every rank must call it."""
        gathered = [value] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_on_rank_zero(self, value: Value) -> list[Value]:
        """Return the values of all ranks on rank zero, and none elsewhere. Every rank must call it."""
        gathered = [value] * self.size if self.is_rank_zero else None
        dist.gather_object(value, gathered)
        return gathered or []

    def broadcast(self, value: Value) -> Value:
        """Return rank zero's value on every rank. Every rank must call it."""
        buffer = [value]
        dist.broadcast_object_list(buffer, src=0)
        return buffer[0]

    def raise_if_any_failed(self, problems: list[str]) -> None:
        """Return only if no rank has problems. Every rank must call it.

        Raises:
            RunError: on every rank, with the problems of all.
        """
        if any(self.sum(len(problems))):
            raise RunError(self.gather(problems))

    def any(self, flag: bool) -> Callable[[], bool]:
        """Begin to ask whether the flag is set on any rank; the function returned waits for the answer.

        Every rank must call both. The question is asked on the CPU and does not wait for the GPU.
        """
        buffer = torch.tensor(int(flag))
        work = dist.all_reduce(buffer, dist.ReduceOp.MAX, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(buffer)

        return answer


formed: list[ProcessGroup] = []  # the one process group of this process, once it is formed


def process_group(timeout: float | None = None) -> ProcessGroup:
    """Form the process group with the other processes of the launcher, or a group of one; return the same one later.

    Args:
        timeout: seconds after which a collective fails; None: torch's default, 10 minutes with NCCL.

    Raises:
        UserError: if the launcher's variables are wrong, or the others do not come.
    """
    if not formed:
        info = launcher_env()
        device = device_for(info) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if timeout is not None:  # for the groups that DeepSpeed will make, too
            for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
                setattr(distributed_c10d, name, timedelta(seconds=timeout))
        peers = init_process_group(info, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        formed.append(ProcessGroup(info.rank, info.size, device, peers))
    return formed[0]


def device_for(info: RankInfo) -> torch.device:
    """Return the GPU of a process: each process of a machine has its own.

    Raises:
        UserError: if the machine has fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count()
    if info.by_srun and gpus == 1:
        return torch.device("cuda", 0)  # srun --gpus-per-task shows each task its own GPU only, as number 0
    if info.local_rank >= gpus:
        raise UserError(
            f"{'SLURM_LOCALID' if info.by_srun else 'LOCAL_RANK'}={info.local_rank}: this machine shows {gpus} GPUs, "
            "and every process needs one of its own; start as many processes as there are GPUs, or hide all GPUs with "
            "CUDA_VISIBLE_DEVICES= to train on CPUs"
        )
    return torch.device("cuda", info.local_rank)


def init_process_group(info: RankInfo, backend: str) -> Peers:
    """Find the other processes and initialize torch's process group with them; return all processes.

    Raises:
        UserError: if they do not all come in time.
    """
    seconds = patience()
    deadline = time.monotonic() + seconds
    # DeepSpeed reads these variables, too.
    os.environ["MASTER_ADDR"] = info.address
    os.environ["MASTER_PORT"] = str(info.port or free_port())
    os.environ["RANK"] = str(info.rank)
    os.environ["WORLD_SIZE"] = str(info.size)
    os.environ["LOCAL_RANK"] = str(info.local_rank)
    peers = Peers(info.rank, [])

    def give_up() -> None:
        """End a process that waits for an answer which will not come, because torch's store waits for ever."""
        silent = "rank zero does not answer" if info.rank else "the others do not answer"
        reasons = peers.unreachable() or [silent]
        message = format_error(not_all_came(info, seconds, reasons))
        print(message, file=sys.stderr, flush=True)
        log_exit(message)
        exit_process(2)

    try:
        with time_limit(seconds + GRACE, give_up):
            own_address, rank_zero_address = wait_for_rank_zero(info, deadline)
            store = open_store(info, seconds)
            this = listen(info.rank, own_address)
            start, everyone = exchange_peers(store, this, rank_zero_address, info.size, deadline)
            peers.all.extend(everyone)
            set_gloo_interface(peers.all[info.rank].address)
            store = dist.PrefixStore(start, store)
            dist.init_process_group(backend, store=store, rank=info.rank, world_size=info.size)
    except (OSError, RuntimeError) as error:
        raise not_all_came(info, seconds, [*peers.unreachable(), first_line(error)]) from error
    return peers


def not_all_came(info: RankInfo, seconds: float, reasons: list[str]) -> UserError:
    """Make the error of processes that do not find each other."""
    return UserError(
        f"RANK={info.rank}: the WORLD_SIZE={info.size} processes did not all come to MASTER_ADDR={info.address}, "
        f"MASTER_PORT={info.port} within {seconds:.0f} seconds (TXL_DIST_PATIENCE): {'; '.join(reasons)}\n"
        "Check that all of them were started and reach that machine, and that its port is free"
    )


@contextlib.contextmanager
def time_limit(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` in a thread if this context takes longer than so many seconds."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def exit_process(code: int = 0) -> NoReturn:
    """End this process at once, without Python's shutdown: everything must have been done, written and said.

    DeepSpeed keeps gloo's threads alive. Once in some fifty runs a finished rank was aborted while Python shut down,
    probably by one of them, and torchrun reported the run as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_rank_zero(info: RankInfo, deadline: float) -> tuple[str, str]:
    """Wait until rank zero can be reached. torch would wait as well, but print a C++ trace at each attempt.

    Returns:
        The addresses of this process and of rank zero, as they see each other.

    Raises:
        OSError: if it cannot be reached before the deadline.
    """
    while True:
        try:
            if info.rank == 0:
                address = str(socket.getaddrinfo(info.address, None)[0][4][0])
                return address, address
            with socket.create_connection((info.address, info.port), timeout=10) as connection:
                return connection.getsockname()[0], connection.getpeername()[0]
        except OSError as error:
            pause(deadline, first_line(error))


def open_store(info: RankInfo, timeout: float) -> dist.Store:
    """Open the store through which the processes find each other: rank zero's or, under torchrun, its agent's."""
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        info.address,
        int(os.environ["MASTER_PORT"]),
        info.size,
        is_master=info.rank == 0 and not by_torchrun,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,  # `exchange_peers` waits for them, and knows then who is missing
        multi_tenant=True,
    )


def exchange_peers(
    store: dist.Store, this: Peer, rank_zero_address: str, size: int, deadline: float
) -> tuple[str, list[Peer]]:
    """Agree on a name for this start of all processes, which no earlier start has had, and learn who they are.

    torchrun's store outlives a restart, with the addresses of processes that have died, and its agents on several
    machines may count restarts differently. So each process says hello under a name of its own, and rank zero answers
    every hello that it finds until all have come. It may answer dead processes, too: they do not read it.

    Args:
        rank_zero_address: as this process sees it.

    Returns:
        The name of this start, and all processes in the order of their ranks.

    Raises:
        OSError: if not all have come before the deadline.
    """
    if this.rank == 0:
        return welcome_all(store, this, size, deadline)
    name = uuid4().hex
    store.set(f"hello {this.rank}", json.dumps([name, rank_zero_address, asdict(this)]))
    wait_for_key(store, f"answer {name}", deadline)
    start = store.get(f"answer {name}").decode()
    store.add(f"came {start}", 1)
    wait_for_key(store, f"all {start}", deadline)
    return start, [Peer(**fields) for fields in json.loads(store.get(f"all {start}"))]


def welcome_all(store: dist.Store, this: Peer, size: int, deadline: float) -> tuple[str, list[Peer]]:
    """Do rank zero's part of `exchange_peers`: answer each hello until all have come, and publish who they are."""
    start = uuid4().hex
    while True:
        came = store.add(f"came {start}", 0)
        if came >= size - 1:
            break
        silent = []
        for rank in range(1, size):
            if store.check([f"hello {rank}"]):
                name = json.loads(store.get(f"hello {rank}"))[0]
                store.set(f"answer {name}", start)
            else:
                silent.append(rank)
        pause(deadline, f"{format_ranks(silent)} did not come" if silent else f"{came + 1} came")
    everyone = [this]
    rank_zero_addresses = []
    for rank in range(1, size):
        _, address, fields = json.loads(store.get(f"hello {rank}"))
        everyone.append(Peer(**fields))
        rank_zero_addresses.append(address)
    everyone = with_public_addresses(everyone, rank_zero_addresses)
    store.set(f"all {start}", json.dumps([asdict(peer) for peer in everyone]))
    return start, everyone


def with_public_addresses(peers: list[Peer], rank_zero_addresses: list[str]) -> list[Peer]:
    """Replace loopback addresses, so that every process has an address that all can reach.

    On its own host rank zero may be known by a loopback address only, such as 127.0.1.1 on Debian, to itself and its
    neighbours; the other hosts have reached it by another address.

    Args:
        rank_zero_addresses: as the other processes see it.
    """
    public = [address for address in [peers[0].address, *rank_zero_addresses] if not is_loopback(address)]
    return [replace(peer, address=public[0]) if public and is_loopback(peer.address) else peer for peer in peers]


def set_gloo_interface(address: str) -> None:
    """Have gloo use the network of this process's own address, unless the user has chosen one.

    By default gloo takes the one that the host's name resolves to: on many hosts the loopback, which no other host can
    reach.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    for interface, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            return


def wait_for_key(store: dist.Store, key: str, deadline: float) -> None:
    """Wait until a key is in the store; raise OSError at the deadline."""
    while not store.check([key]):
        pause(deadline, "rank zero does not answer")


def pause(deadline: float, reason: str) -> None:
    """Sleep briefly between attempts; raise OSError with the reason for waiting at the deadline.

    Signals do not end the wait: the others would wait in vain for a rank that has left.
    """
    if time.monotonic() > deadline:
        raise OSError(reason)
    time.sleep(0.05)


def free_port() -> int:
    """Return a port of this host that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
