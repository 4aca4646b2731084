"""Links that cannot be, and several in one call: every result, and how long it takes."""

from __future__ import annotations

import json
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import linking
import pytest
from linking import (
    ALREADY_LINK,
    LINK_FAILED,
    PARAM_INVALID,
    SOON_S,
    SUCCESS,
    TIMEOUT,
    UNLINK_FAILED,
    budget_s,
    dead_port,
    descriptors,
    linked_ids,
    listen,
    publish,
    pulls,
)

from llm_datadist import (
    LLMClusterInfo,
    LLMRole,
)
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info
from llm_datadist.testing.timing import eventually, takes_at_most

other = linking.other
silent_port = linking.silent_port
other_process = linking.other_process
# -- links that cannot be --------------------------------------------------------------------------


@pytest.mark.shows("link.refused", "error.17", "relies.4")
def test_nobody_listens(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.start(LLMRole.DECODER, 2)
    port = dead_port()
    with caplog.at_level(logging.ERROR, "LLM_DATADIST"), takes_at_most(SOON_S):
        assert node.link(port, 1) == LINK_FAILED
    assert f"cannot connect to 127.0.0.1:{port}" in caplog.text
    assert linked_ids(node) == []


@pytest.mark.parametrize("security", ["", json.dumps({"secret": "of more than sixteen bytes"})])
@pytest.mark.parametrize(
    ("banner", "name"),
    [(b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP")],
)
def test_the_port_of_something_else_is_told_apart(
    node: Node, caplog: pytest.LogCaptureFixture, banner: bytes, name: str, security: str
) -> None:
    node.start(LLMRole.DECODER, 2, **({"link_security": security} if security else {}))

    def answer() -> None:
        sock, _ = server.accept()
        with sock:
            sock.recv(1)
            sock.sendall(banner)
            while sock.recv(4096):
                pass

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as thread:
        thread.submit(answer)
        with caplog.at_level(logging.ERROR, "LLM_DATADIST"), takes_at_most(SOON_S):
            assert node.link(server.getsockname()[1], 1) != SUCCESS
    assert f"{name} is spoken there: it is the port of something else" in caplog.text


def test_a_port_where_nothing_is_said_is_told_apart(
    node: Node, silent_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    node.start(LLMRole.DECODER, 2)
    with caplog.at_level(logging.ERROR, "LLM_DATADIST"):
        assert node.link(silent_port, 1, 300) == TIMEOUT
    assert "nobody there speaks as a cluster does" in caplog.text


@pytest.mark.shows("link.silent")
@pytest.mark.parametrize("timeout", [300, 1000])
def test_a_silent_address_times_out_in_time(node: Node, silent_port: int, timeout: int) -> None:
    node.start(LLMRole.DECODER, 2)
    before = descriptors(node)
    begun = time.monotonic()
    assert node.link(silent_port, 1, timeout) == TIMEOUT
    took = time.monotonic() - begun
    assert timeout / 1000 <= took <= budget_s(timeout)
    assert linked_ids(node) == []
    assert descriptors(node) == before


@pytest.mark.shows("link.flags_differ", "link.both_rolled_back")
@pytest.mark.parametrize("mine", [False, True])
def test_ends_that_differ_in_remote_access_do_not_link(
    node: Node, peer: NodeProcess, caplog: pytest.LogCaptureFixture, mine: bool
) -> None:
    port = listen(peer, enable_remote_cache_accessible=not mine)
    node.start(LLMRole.DECODER, 2, enable_remote_cache_accessible=mine)
    with caplog.at_level(logging.ERROR, "LLM_DATADIST"), takes_at_most(SOON_S):
        assert node.link(port, 1) == PARAM_INVALID
    assert "enable_remote_cache_accessible differs" in caplog.text
    assert (linked_ids(node), peer.call(linked_ids)) == ([], [])
    node.stop()
    node.start(LLMRole.DECODER, 2, enable_remote_cache_accessible=not mine)
    assert node.link(port, 1) == SUCCESS
    assert pulls(node, 1)


@pytest.mark.shows("link.one_remote_address")
@pytest.mark.parametrize("addresses", [0, 2])
def test_a_cluster_has_exactly_one_remote_address(
    node: Node, peer: NodeProcess, addresses: int
) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    info = LLMClusterInfo()
    info.remote_cluster_id = 1
    info.append_local_ip_info("127.0.0.1", 0)
    for _ in range(addresses):
        info.append_remote_ip_info("127.0.0.1", port)
    assert node.datadist.link_clusters([info]) == (PARAM_INVALID, [PARAM_INVALID])
    assert linked_ids(node) == []
    assert node.link(port, 1) == SUCCESS
    assert node.datadist.unlink_clusters([info]) == (PARAM_INVALID, [PARAM_INVALID])
    assert linked_ids(node) == [1]
    assert node.datadist.unlink_clusters([info], force=True) == (SUCCESS, [SUCCESS])
    assert linked_ids(node) == []


@pytest.mark.shows("error.16")
def test_no_clusters_are_no_success(node: Node) -> None:
    node.start(LLMRole.DECODER, 2)
    assert node.datadist.link_clusters([]) == (PARAM_INVALID, [])
    assert node.datadist.unlink_clusters([]) == (PARAM_INVALID, [])
    assert node.datadist.unlink_clusters([], force=True) == (PARAM_INVALID, [])


# -- several clusters in one call ------------------------------------------------------------------


@pytest.mark.shows("datadist.link_clusters")
def test_the_aggregate_is_the_last_failure_and_successes_stay(
    node: Node, peer: NodeProcess, other: NodeProcess
) -> None:
    first, second = listen(peer, 1, seed=5), listen(other, 3, seed=6)
    node.start(LLMRole.DECODER, 2)
    no_address = LLMClusterInfo()
    no_address.remote_cluster_id = 9
    no_address.append_local_ip_info("127.0.0.1", 0)
    infos = [
        cluster_info(first, 1),
        no_address,
        cluster_info(dead_port(), 8),
        cluster_info(second, 3),
    ]
    assert node.datadist.link_clusters(infos) == (
        LINK_FAILED,
        [SUCCESS, PARAM_INVALID, LINK_FAILED, SUCCESS],
    )
    assert linked_ids(node) == [1, 3]
    assert pulls(node, 1, 5)
    assert pulls(node, 3, 6)
    assert node.datadist.link_clusters(tuple(reversed(infos))) == (
        ALREADY_LINK,
        [ALREADY_LINK, LINK_FAILED, PARAM_INVALID, ALREADY_LINK],
    )
    assert node.datadist.unlink_clusters(infos) == (
        UNLINK_FAILED,
        [SUCCESS, PARAM_INVALID, UNLINK_FAILED, SUCCESS],
    )
    assert linked_ids(node) == []


@pytest.mark.shows("link.parallel", "relies.4")
def test_twenty_clusters_at_once_take_as_long_as_the_slowest(
    node: Node, peer: NodeProcess, other: NodeProcess
) -> None:
    node.start(LLMRole.DECODER, 2)
    silent = [socket.create_server(("127.0.0.1", 0)) for _ in range(9)]
    ports = [
        listen(peer, 1),
        *(sock.getsockname()[1] for sock in silent),
        *(dead_port() for _ in range(9)),
        listen(other, 3),
    ]
    try:
        with takes_at_most(budget_s(1000)):
            aggregate, statuses = node.datadist.link_clusters(
                [cluster_info(port, None) for port in ports], 1000
            )
    finally:
        for sock in silent:
            sock.close()
    assert statuses == [SUCCESS, *[TIMEOUT] * 9, *[LINK_FAILED] * 9, SUCCESS]
    assert aggregate == LINK_FAILED
    assert linked_ids(node) == [1, 3]


def test_one_cluster_twice_in_a_call_gives_one_link(node: Node, peer: NodeProcess) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    for _ in range(5):
        aggregate, statuses = node.datadist.link_clusters([cluster_info(port, 1)] * 8)
        assert (aggregate, sorted(statuses)) == (ALREADY_LINK, [SUCCESS, *[ALREADY_LINK] * 7])
        assert linked_ids(node) == [1]
        assert eventually(lambda: peer.call(linked_ids) == [2])
        assert pulls(node, 1)
        assert node.unlink(port, 1) == SUCCESS


def test_many_threads_that_link_the_same_peer_get_one_link(node: Node, peer: NodeProcess) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    with ThreadPoolExecutor(16) as pool:
        for _ in range(5):
            statuses = list(pool.map(lambda _: node.link(port, 1), range(16)))
            assert sorted(statuses) == [SUCCESS, *[ALREADY_LINK] * 15]
            assert linked_ids(node) == [1]
            assert pulls(node, 1)
            assert node.unlink(port, 1) == SUCCESS


def test_two_ends_may_link_to_each_other_at_once(node: Node, peer: NodeProcess) -> None:
    their_port = listen(peer)
    my_port = node.start(LLMRole.DECODER, 2, listen_ip_info="127.0.0.1:0")
    publish(node, 9)
    for _ in range(10):
        peer.begin(Node.link, my_port, 2)
        mine = node.link(their_port, 1)
        theirs = peer.result()
        assert {mine, theirs} <= {SUCCESS, ALREADY_LINK}
        assert SUCCESS in (mine, theirs)
        assert pulls(node, 1)
        assert peer.call(pulls, 2, 9)
        assert node.unlink(their_port, 1) == SUCCESS
        assert linked_ids(node) == []
        assert eventually(lambda: peer.call(linked_ids) == [])
