"""The processes of a run as peers: where they can be reached, and what a broken connection says about them."""

import os
import socket
from dataclasses import replace

import pytest

from txl_dist.distributed.peers import Peer, Peers, format_ranks, listen, probe
from txl_dist.distributed.process_group import with_public_addresses

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:16595."
ADVICE = " This is typically caused by a remote worker crashing."


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def peers():
    """Four on three hosts, of which two have one name; the first two can be reached, the others have ended."""
    first = listen(0, "127.0.0.1")
    gone = replace(first, host="node7", machine="other", address="127.0.0.2", port=closed_port())
    return Peers(0, [first, replace(first, rank=1), replace(gone, rank=2), replace(gone, rank=3, host=first.host)])


def test_a_process_answers_as_long_as_it_lives(peers):
    answers = probe(peers.all)
    assert [answers[peer] for peer in peers.all] == ["", "", *["the process has ended"] * 2]
    assert peers.unreachable(peers.all[:3]) == ["rank 2 on node7 (127.0.0.2): the process has ended"]


def test_hosts_of_one_name_are_not_one_host(peers):
    assert peers.local_pids == {0: os.getpid(), 1: os.getpid()}


def test_a_broken_connection_names_the_rank_and_its_host(peers):
    peers.all[2] = replace(peers.all[2], address="127.0.0.7")
    gone, reason, advice = peers.broken_connection(RuntimeError(CLOSED.replace("10.0.0.7", "127.0.0.7") + ADVICE))
    assert gone == "rank 2 on node7 (127.0.0.7): the process has ended"
    assert reason == f"rank 0 on {peers.all[0].host} stopped: Connection closed by peer [127.0.0.7]:16595."
    assert "same command" in advice


@pytest.mark.parametrize(
    "fault", ["[enforce fail at /gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4", "a nan"]
)
def test_a_fault_is_not_taken_for_a_broken_connection(peers, fault):
    assert peers.broken_connection(RuntimeError(fault)) == []


@pytest.mark.parametrize(
    "numbers, words",
    [([1], "rank 1"), ([1, 2], "ranks 1 and 2"), ([1, 2, 3], "ranks 1 to 3"), ([1, 3, 4], "ranks 1, 3 and 4")],
)
def test_ranks_are_written_as_text(numbers, words):
    assert format_ranks(numbers) == words


@pytest.mark.parametrize(
    "own, seen, wanted",
    [
        (["127.0.1.1", "127.0.0.1", "10.0.0.2"], ["127.0.1.1", "10.0.0.1"], ["10.0.0.1", "10.0.0.1", "10.0.0.2"]),
        (["::1", "::1", "::1"], ["::1", "::1"], ["::1", "::1", "::1"]),
        (["10.0.0.1", "127.0.0.1", "10.0.0.2"], ["127.0.1.1", "10.0.0.9"], ["10.0.0.1", "10.0.0.1", "10.0.0.2"]),
    ],
)
def test_a_loopback_address_of_rank_zero_is_replaced_by_a_public_one(own, seen, wanted):
    peers = [Peer(rank, 1, "host", "host", address, 1) for rank, address in enumerate(own)]
    assert [peer.address for peer in with_public_addresses(peers, seen)] == wanted
