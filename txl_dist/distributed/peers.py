"""The processes of a run: who they are, on which hosts, and whether they still answer.

Each process listens at a port where nobody accepts: the kernel does. A connection shows that host, network and process
are there, even where the process hangs; a refused one, that the process has ended; no answer, that the host or the way
to it is gone. Nothing is sent while all is well.
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

PROBING = 5.0  # seconds that a process has to answer: two packets may be lost
PRINTING = 0.5  # seconds that a process has for its stacks
ENDING = 2.0  # seconds that the ranks of this host have to end by themselves
BACKLOG = 4096  # connections that nobody accepts
CONTINUES = "The same command continues from the last checkpoint."
SHOWN = 8  # hosts that a message names
# What gloo says in a message of its own, but for one that begins with "[enforce fail at"; and NCCL.
REPORT = re.compile(r"\[\S*gloo/\S+:\d+\] (?P<gloo>.*)|(?P<nccl>ncclRemoteError.*)")
ADDRESS = re.compile(r"\[([0-9a-fA-F.:]+)(?:%\w+)?\]:\d+")


@dataclass(frozen=True)
class Peer:
    """One process. machine: tells its host from others of the same name; address, port: where it can be reached."""

    rank: int
    pid: int
    host: str
    machine: str
    address: str
    port: int


@dataclass(frozen=True)
class Peers:
    """All processes of a run, by rank, as `rank` sees them."""

    rank: int
    all: list[Peer]

    @property
    def mates(self) -> dict[int, int]:
        """Return rank -> pid of the processes on this host, this one included."""
        machine = self.all[self.rank].machine
        return {peer.rank: peer.pid for peer in self.all if peer.machine == machine}

    @property
    def turn(self) -> float:
        """Return how many seconds this process has to wait until one before it on this host has spoken for all."""
        mates = list(self.mates)
        return mates.index(self.rank) * (PROBING + PRINTING * (len(mates) + 2) + ENDING)

    def missing(self, peers: Iterable[Peer] | None = None) -> list[str]:
        """Ask processes, all by default, whether they are there; describe those that are not, a line per host."""
        answers = probe([peer for peer in peers or self.all if peer.rank != self.rank])
        return describe({peer: answer for peer, answer in answers.items() if answer})

    def broken(self, error: RuntimeError) -> list[str]:
        """Describe the broken connection that gloo, NCCL or torch's store reports; empty where an error is a fault."""
        others = [peer for peer in self.all if peer.rank != self.rank]
        if isinstance(error, DistNetworkError):
            suspects, reason = others[:1], first_line(error)  # the store is the first one's
        elif report := REPORT.search(str(error)):
            reason = (report["gloo"] or report["nccl"]).partition(" This is typically")[0]
            addresses = set(ADDRESS.findall(reason))
            suspects = [peer for peer in others if peer.address in addresses] or others
        else:
            return []
        gone = self.missing(suspects) or describe(dict.fromkeys(suspects, "the connection broke"))
        return [*gone, f"rank {self.rank} on {self.all[self.rank].host} stopped: {reason}", CONTINUES]

    def end_mates(self) -> None:
        """End the other processes on this host: they can do nothing but wait for this one."""
        others = [pid for rank, pid in self.mates.items() if rank != self.rank]
        for how in (END, signal.SIGKILL) if others else ():
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, how)
            time.sleep(ENDING if how == END else 0)


def introduce(rank: int, address: str) -> Peer:
    """Make this process one that the others can reach until it ends."""
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
    """Put what was found out about processes into words, a line per host."""
    hosts: dict[tuple[str, str, str], list[int]] = {}
    for peer, answer in answers.items():
        hosts.setdefault((peer.host, peer.address, answer), []).append(peer.rank)
    lines = [f"{ranks(numbers)} on {host} ({address}): {answer}" for (host, address, answer), numbers in hosts.items()]
    return lines[:SHOWN] + [f"and {len(lines) - SHOWN} more hosts"] * (len(lines) > SHOWN)


def ranks(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"ranks {numbers[0]} to {numbers[-1]}"
    return f"ranks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def probe(peers: list[Peer]) -> dict[Peer, str]:
    """Connect to processes, all at once, and return what is wrong with each; nothing with one that is there."""
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
            answers[peer] = meaning(attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            attempt.close()
    for _, attempt in waiting.values():
        attempt.close()
    return answers


def meaning(result: int) -> str:
    if result == errno.ECONNREFUSED:
        return "the process has ended"
    return f"does not answer ({os.strerror(result)})" if result else ""


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
