"""The processes of a run as peers: on which hosts they are, and whether they still answer.

Each process listens at a port, where the kernel accepts connections for it. A connection shows that host, network and
process are there, even if the process hangs; a refused one, that the process has ended; no answer, that the host or the
route to it is gone. Nothing is sent while all is well.
"""

import contextlib
import errno
import ipaddress
import os
import re
import select
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass

from torch.distributed import DistNetworkError

from txl_dist.distributed.preemption import END
from txl_dist.errors import first_line
from txl_dist.files.owner import kernel, process_namespace

PROBING = 5.0  # seconds in which a process must answer: two packets may be lost
PRINTING = 0.5  # seconds in which a process prints the stacks of its threads
REPORTING = 5.0  # seconds in which rank zero's trackers may send that a run stalls
ENDING = 2.0  # seconds in which the ranks of this host may end by themselves
BACKLOG = 4096  # connections that may wait at the port, because nothing ever accepts them
CONTINUES = "The same command continues from the last checkpoint."
MAX_HOSTS = 8  # that a message names
# Messages of broken connections by gloo and NCCL. A message of gloo that begins with "[enforce fail at" is a fault.
REPORT = re.compile(r"\[\S*gloo/\S+:\d+\] (?P<gloo>.*)|(?P<nccl>ncclRemoteError.*)")
ADDRESS = re.compile(r"\[([0-9a-fA-F.:]+)(?:%\w+)?\]:\d+")


@dataclass(frozen=True)
class Peer:
    """One process of a run.

    Attributes:
        machine: identifies its host, also among hosts of the same name.
        address, port: where it can be reached.
    """

    rank: int
    pid: int
    host: str
    machine: str
    address: str
    port: int


@dataclass(frozen=True)
class Peers:
    """All processes of a run in the order of their ranks, as process `rank` sees them."""

    rank: int
    all: list[Peer]

    @property
    def others(self) -> list[Peer]:
        """Return all processes but this one."""
        return [peer for peer in self.all if peer.rank != self.rank]

    @property
    def local_pids(self) -> dict[int, int]:
        """Return rank -> process ID of the processes on this host, this one included."""
        machine = self.all[self.rank].machine
        return {peer.rank: peer.pid for peer in self.all if peer.machine == machine}

    @property
    def turn(self) -> float:
        """Return the seconds to wait before this process speaks for its host: those of lower rank come first."""
        local_ranks = list(self.local_pids)
        seconds_per_turn = PROBING + PRINTING * (len(local_ranks) + 2) + REPORTING + ENDING
        return local_ranks.index(self.rank) * seconds_per_turn

    def unreachable(self, peers: Iterable[Peer] | None = None) -> list[str]:
        """Probe processes, by default all others, and describe those that do not answer, one line per host."""
        answers = probe([peer for peer in peers or self.all if peer.rank != self.rank])
        return describe({peer: answer for peer, answer in answers.items() if answer})

    def broken_connection(self, error: RuntimeError) -> list[str]:
        """Describe the broken connection that gloo, NCCL or torch's store reports; empty if the error is another."""
        report = REPORT.search(str(error))
        if isinstance(error, DistNetworkError):
            suspects = self.others[:1]  # rank zero holds the store
            reason = first_line(error)
        elif report:
            reason = (report["gloo"] or report["nccl"]).partition(" This is typically")[0]
            addresses = set(ADDRESS.findall(reason))
            suspects = [peer for peer in self.others if peer.address in addresses] or self.others
        else:
            return []
        gone = self.unreachable(suspects) or describe(dict.fromkeys(suspects, "the connection broke"))
        return [*gone, f"rank {self.rank} on {self.all[self.rank].host} stopped: {reason}", CONTINUES]

    def end_local(self) -> None:
        """End the other processes on this host, which can only wait for this one: by a signal, then by force."""
        others = [pid for rank, pid in self.local_pids.items() if rank != self.rank]
        for number in (END, signal.SIGKILL) if others else ():
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(ENDING if number == END else 0)


def listen(rank: int, address: str) -> Peer:
    """Open a port at which the others can probe this process until it ends, and return this process as a peer."""
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0), backlog=BACKLOG)
    port = listener.getsockname()[1]
    listener.detach()  # it stays open
    # Containers of one machine may share a host name, and so may hosts that were made from one image.
    host = socket.gethostname()
    return Peer(rank, os.getpid(), host, f"{host} {kernel()} {process_namespace()}", address, port)


def describe(answers: dict[Peer, str]) -> list[str]:
    """Describe the state of processes, one line per host and state."""
    hosts: dict[tuple[str, str, str], list[int]] = {}
    for peer, answer in answers.items():
        hosts.setdefault((peer.host, peer.address, answer), []).append(peer.rank)
    lines = [
        f"{format_ranks(ranks)} on {host} ({address}): {answer}" for (host, address, answer), ranks in hosts.items()
    ]
    if len(lines) > MAX_HOSTS:
        return [*lines[:MAX_HOSTS], f"and {len(lines) - MAX_HOSTS} more hosts"]
    return lines


def format_ranks(ranks: list[int]) -> str:
    """Write ascending ranks as text: `rank 1`, `ranks 1 to 3`, `ranks 1, 3 and 4`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def probe(peers: list[Peer]) -> dict[Peer, str]:
    """Connect to processes, all at once, and return the state of each; "" for one that is there."""
    answers = dict.fromkeys(peers, f"does not answer (in {PROBING:.0f} seconds)")
    waiting: dict[int, tuple[Peer, socket.socket]] = {}
    poll = select.poll()
    for peer in peers:
        attempt = socket.socket(socket.AF_INET6 if ":" in peer.address else socket.AF_INET)
        attempt.setblocking(False)
        result = attempt.connect_ex((peer.address, peer.port))
        if result in (0, errno.EINPROGRESS):
            waiting[attempt.fileno()] = peer, attempt
            poll.register(attempt, select.POLLOUT)
        else:
            answers[peer] = f"does not answer ({os.strerror(result)})"
            attempt.close()
    until = time.monotonic() + PROBING
    while waiting and time.monotonic() < until:
        for number, _ in poll.poll(max(0.0, until - time.monotonic()) * 1000):
            peer, attempt = waiting.pop(number)
            poll.unregister(number)
            answers[peer] = state(attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            attempt.close()
    for _, attempt in waiting.values():
        attempt.close()
    return answers


def state(result: int) -> str:
    """Describe a process by the error number of a connection to it, 0 for none."""
    if result == errno.ECONNREFUSED:
        return "the process has ended"
    return f"does not answer ({os.strerror(result)})" if result else ""


def is_loopback(address: str) -> bool:
    """Return whether an IP address leads to this host itself."""
    return ipaddress.ip_address(address).is_loopback
