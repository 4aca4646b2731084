"""Which process is at the other end: the kernel says, and whoever lies about it gets nothing.

Promise 4: no stranger, linked peer or neighbour has a cluster read what is not its peer's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import same_host_wire
from same_host_wire import (
    SECRET,
    Memory,
    attach_to,
    fetched,
    greeting,
    kernels_names,
    linked_ids,
    meet,
    own_secret,
    same_host_names,
    start,
    try_to_connect,
    try_to_link,
    welcome_of,
)
from wire import NONCE, Wire, hello

from isolation import become, leave_network, needs_root
from llm_datadist import LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.testing.cluster import Node, NodeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
#: the cluster that is lied to, and its neighbour
VICTIM, NEIGHBOUR = 1, 2
WHOSE = pytest.mark.parametrize("whose", [VICTIM, NEIGHBOUR], ids=["its-own", "its-neighbours"])


class Cluster:
    """One that runs in a process of its own."""

    def __init__(self, process: NodeProcess, cluster_id: int) -> None:
        self.process = process
        self.port = process.call(start, cluster_id)
        self.secret_addr = process.call(own_secret)
        self.welcome = welcome_of(self.port)
        self.offer = self.welcome.offers["cma"]


@pytest.fixture(scope="module")
def processes() -> Iterator[list[NodeProcess]]:
    with NodeProcess() as one, NodeProcess() as other:
        yield [one, other]


@pytest.fixture
def clusters(processes: list[NodeProcess]) -> Iterator[dict[int, Cluster]]:
    """Two clusters of one user on this host, by id."""
    yield {number: Cluster(process, number) for number, process in enumerate(processes, 1)}
    for process in processes:
        process.call(Node.stop)


@pytest.fixture
def victim(clusters: dict[int, Cluster]) -> Cluster:
    return clusters[VICTIM]


# -- callers ---------------------------------------------------------------------------------------


def test_who_is_what_it_says_is_linked_and_only_its_own_memory_is_read(
    clusters: dict[int, Cluster], victim: Cluster
) -> None:
    """What the other tests do works, but for the lie in it."""
    mine, data = Memory(), np.frombuffer(SECRET[::-1], np.uint8).copy()
    with meet(victim.offer) as control:
        welcome, answer = try_to_link(control, greeting(b"", mine.probe))
        assert answer == m.Linked("cma")
        with meet(victim.offer) as stream:
            stream.send(m.Attach(welcome.token, False))
            stream.expect(m.Attached)
            assert fetched(stream, int(data.ctypes.data), mine.probe) == SECRET[::-1]
            assert victim.process.call(linked_ids) == [4242], "seen, though it has no name"
            for cluster in clusters.values():
                probe = cluster.welcome.probe
                assert fetched(stream, cluster.secret_addr, probe) != SECRET


@WHOSE
def test_over_tcp_the_same_host_path_leads_nowhere(
    clusters: dict[int, Cluster], victim: Cluster, whose: int
) -> None:
    """An offer that is sent back to its owner, or is another's, with that one's probe."""
    other = clusters[whose]
    with Wire.dial(victim.port) as control, Wire.dial(victim.port) as stream:
        welcome, answer = try_to_link(control, greeting(other.offer, other.welcome.probe))
        assert isinstance(answer, m.Unusable)
        stream.send(m.Attach(welcome.token, False))
        stream.expect(m.Attached)
        assert fetched(stream, other.secret_addr, other.welcome.probe) != SECRET
    assert victim.process.call(linked_ids) == []


@WHOSE
def test_a_caller_that_lies_about_everything_is_read_itself(
    clusters: dict[int, Cluster], victim: Cluster, whose: int
) -> None:
    """At that address in the caller's memory there is nothing, or another nonce."""
    other = clusters[whose]
    said = other.welcome
    first = greeting(other.offer, said.probe, cluster_id=said.cluster_id, instance=said.instance)
    with meet(victim.offer) as control, meet(victim.offer) as stream:
        welcome, answer = try_to_link(control, first)
        assert isinstance(answer, m.Unusable)
        stream.send(m.Attach(welcome.token, False))
        stream.expect(m.Attached)
        assert fetched(stream, other.secret_addr, said.probe) != SECRET
    assert victim.process.call(linked_ids) == []


def test_only_the_process_of_a_link_adds_streams_to_it(
    clusters: dict[int, Cluster], victim: Cluster
) -> None:
    with meet(victim.offer) as control, Wire.dial(victim.port) as by_tcp:
        welcome, answer = try_to_link(control, greeting(b"", (mine := Memory()).probe))
        assert answer == m.Linked("cma"), mine
        neighbour = clusters[NEIGHBOUR].process
        told = neighbour.call(attach_to, victim.offer, welcome.token)
        by_tcp.send(m.Attach(welcome.token, False))
        for refused in (told, by_tcp.receive()):
            assert isinstance(refused, m.Refused)
            assert refused.status == NOT_YET_LINK
        with meet(victim.offer) as stream:
            stream.send(m.Attach(welcome.token, False))
            stream.expect(m.Attached)


def test_a_file_named_like_a_linked_callers_socket_makes_nobody_that_caller(
    clusters: dict[int, Cluster],
    victim: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel names a caller's socket, and /proc says how; a file may have any name."""
    caller, before = clusters[NEIGHBOUR], kernels_names()
    assert caller.process.call(Node.link, victim.port) == LLMStatusCode.LLM_SUCCESS
    monkeypatch.chdir(tmp_path)
    names = kernels_names() - before
    assert names
    for name in names:
        file = (b"\0" + name.encode()).hex()
        with meet(victim.offer, file) as thief:
            thief.send(greeting(b"", Memory().probe, cluster_id=NEIGHBOUR))
            assert thief.expect(m.Refused).status == LLMStatusCode.LLM_LINK_FAILED
        Path(file).unlink()
        with meet(victim.offer, file) as cutter:
            cutter.send(m.Forget(caller.welcome.instance, NONCE))
            cutter.expect(m.ByeDone)
    assert victim.process.call(linked_ids) == [NEIGHBOUR]
    assert caller.process.call(linked_ids) == [VICTIM]


@pytest.mark.parametrize("name", [b"\0", b"\0" + b"x" * 107], ids=["short", "long"])
def test_a_stranger_whose_end_has_a_name_of_its_choice_cuts_no_link(
    clusters: dict[int, Cluster], victim: Cluster, name: bytes
) -> None:
    """As long as the kernel allows: what a live peer is asked about it must be bounded."""
    caller = clusters[NEIGHBOUR]
    assert caller.process.call(Node.link, victim.port) == LLMStatusCode.LLM_SUCCESS
    with meet(victim.offer, name) as stranger:
        stranger.send(greeting(b"", Memory().probe, cluster_id=NEIGHBOUR))
        assert stranger.expect(m.Refused).status == LLMStatusCode.LLM_LINK_FAILED
    with meet(victim.offer, name) as stranger:
        stranger.send(m.Forget(caller.welcome.instance, NONCE))
        stranger.expect(m.ByeDone)
    assert victim.process.call(linked_ids) == [NEIGHBOUR]
    assert caller.process.call(linked_ids) == [VICTIM]


def test_a_link_over_tcp_gets_no_streams_from_the_same_host_socket(victim: Cluster) -> None:
    with Wire.dial(victim.port) as control, meet(victim.offer) as stream:
        control.send(hello(is_remote_accessible=True))
        welcome = control.expect(m.Welcome)
        stream.send(m.Attach(welcome.token, False))
        assert stream.expect(m.Refused).status == NOT_YET_LINK


def test_tcp_is_no_path_of_the_same_host_socket(victim: Cluster) -> None:
    with meet(victim.offer) as control:
        control.send(greeting(b"", Memory().probe))
        control.expect(m.Welcome)
        control.send(m.Ready("tcp"))
        assert control.expect(m.Unusable).path == "tcp"


# -- where and as whom -----------------------------------------------------------------------------


@needs_root
def test_another_user_is_not_read(victim: Cluster, stranger: NodeProcess) -> None:
    """Though root may: the peer could become a program that runs as somebody else."""
    assert stranger.call(try_to_connect, victim.offer) == "connected"
    stranger.call(become, 65534)
    answer = stranger.call(same_host_wire.link_honestly, victim.offer)
    assert isinstance(answer, m.Unusable)
    assert "run both processes as the same user" in answer.reason
    assert victim.process.call(linked_ids) == []


@needs_root
def test_from_another_network_namespace_the_socket_is_not_there(
    victim: Cluster, stranger: NodeProcess
) -> None:
    assert stranger.call(try_to_connect, victim.offer) == "connected"
    stranger.call(leave_network)
    assert stranger.call(try_to_connect, victim.offer) == "ConnectionRefusedError"


@pytest.fixture
def stranger() -> Iterator[NodeProcess]:
    """A process that may become another user's, or another host's."""
    with NodeProcess() as process:
        yield process


def test_a_process_that_took_a_dead_callers_number_is_not_read(victim: Cluster) -> None:
    """The kernel tells the caller's number even when that is somebody else's by now."""
    control, number = same_host_wire.connection_of_a_dead_process(victim.offer)
    with control, same_host_wire.process_with_number(number) as heir:
        cluster = Cluster(heir, 3)
        _, answer = try_to_link(control, greeting(cluster.offer, cluster.welcome.probe))
        assert isinstance(answer, m.Unusable)
        assert "is gone" in answer.reason
    assert victim.process.call(linked_ids) == []


def test_a_process_that_took_a_linked_callers_number_is_not_read(victim: Cluster) -> None:
    """Its connections live on, in a process that they were given to."""
    caller = same_host_wire.linked_process(victim.offer)
    heirs = same_host_wire.process_with_number(caller.number)
    with caller.control, caller.stream as stream, heirs as heir:
        cluster = Cluster(heir, 3)
        assert fetched(stream, cluster.secret_addr, cluster.welcome.probe) != SECRET


def test_a_cluster_that_allows_tcp_alone_cannot_be_met(processes: list[NodeProcess]) -> None:
    process = processes[0]
    process.call(start, 1)
    assert len(process.call(same_host_names)) == 1
    process.call(Node.stop)
    port = process.call(start, 1, transfer_path="tcp")
    try:
        assert process.call(same_host_names) == []
        assert welcome_of(port).offers["cma"] == b"", "no name"
    finally:
        process.call(Node.stop)
