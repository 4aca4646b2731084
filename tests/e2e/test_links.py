"""Links: what they are, over which path, and how they are found."""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import linking
import pytest
from linking import (
    ALREADY_LINK,
    LINK_FAILED,
    NOT_YET_LINK,
    PARAM_INVALID,
    SEED,
    SOON_S,
    SUCCESS,
    TIMEOUT,
    budget_s,
    dead_port,
    descriptors,
    link_list,
    linked_ids,
    listen,
    publish,
    publish_large,
    pull_status,
    pulls,
    pulls_large,
)

from llm_datadist import (
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable

other = linking.other
other_process = linking.other_process
# -- what a link is --------------------------------------------------------------------------------


@pytest.mark.shows("datadist.link_clusters", "datadist.links")
def test_a_link_shows_at_both_ends_and_serves_both(
    node: Node, peer: NodeProcess, is_accessible: bool, path: str
) -> None:
    settings: dict[str, Any] = {
        "enable_remote_cache_accessible": is_accessible,
        "transfer_path": path,
    }
    port = listen(peer, **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    publish(node, 9)
    assert node.link(port, 1) == SUCCESS
    assert link_list(node) == [(1, path, "", ("127.0.0.1", port))]
    assert peer.call(link_list) == [(2, path, "", None)]
    assert pulls(node, 1)
    assert peer.call(pulls, 2, 9)


@pytest.mark.shows("error.18")
def test_linking_again_is_already_link_and_leaves_nothing_behind(
    node: Node, peer: NodeProcess
) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    assert node.link(port, 1) == SUCCESS
    assert pulls(node, 1)
    before = descriptors(node), peer.call(descriptors), threading.active_count()
    for _ in range(20):
        assert node.datadist.link_clusters([cluster_info(port, 1)]) == (
            ALREADY_LINK,
            [ALREADY_LINK],
        )
    assert (descriptors(node), threading.active_count()) == (before[0], before[2])
    assert eventually(lambda: peer.call(descriptors) == before[1])
    assert (linked_ids(node), peer.call(linked_ids)) == ([1], [2])
    assert pulls(node, 1)


@pytest.mark.shows("relies.4", "relies.7")
def test_an_unset_cluster_id_is_learned(node: Node, peer: NodeProcess) -> None:
    port = listen(peer, cluster_id=2**64 - 1)
    node.start(LLMRole.DECODER, 0)
    assert node.link(port, None) == SUCCESS
    assert linked_ids(node) == [2**64 - 1]
    assert node.link(port, None) == ALREADY_LINK
    assert pulls(node, 2**64 - 1)
    assert peer.call(linked_ids) == [0]


@pytest.mark.shows("link.wrong_id")
def test_a_wrong_cluster_id_links_under_the_peers_own(node: Node, peer: NodeProcess) -> None:
    port = listen(peer, cluster_id=1)
    node.start(LLMRole.DECODER, 2)
    for _ in range(3):  # a repetition replaces the link: nothing says that it is the same one
        assert node.link(port, 77) == SUCCESS
        assert linked_ids(node) == [1]
        assert pulls(node, 1)
        assert pull_status(node, 77) == NOT_YET_LINK
    assert eventually(lambda: peer.call(linked_ids) == [2])
    assert node.link(port, 1) == ALREADY_LINK


@pytest.mark.shows("relies.7")
@pytest.mark.parametrize("cluster_id", [0, 7])
def test_both_ends_may_have_the_same_cluster_id(
    node: Node, peer: NodeProcess, cluster_id: int, is_accessible: bool
) -> None:
    port = listen(peer, cluster_id, enable_remote_cache_accessible=is_accessible)
    node.start(LLMRole.DECODER, cluster_id, enable_remote_cache_accessible=is_accessible)
    publish(node, 9)
    assert node.link(port, cluster_id) == SUCCESS
    assert pulls(node, cluster_id)
    assert peer.call(pulls, cluster_id, 9)
    assert node.link(port, cluster_id) == ALREADY_LINK
    assert node.unlink(port, cluster_id) == SUCCESS
    assert linked_ids(node) == []
    assert eventually(lambda: peer.call(linked_ids) == [])


@pytest.mark.shows("relies.7")
def test_two_peers_with_one_cluster_id_are_told_apart_by_address(
    node: Node, peer: NodeProcess, other: NodeProcess
) -> None:
    first, second = listen(peer, seed=5), listen(other, seed=6)
    node.start(LLMRole.DECODER, 2)
    assert [node.link(first, 1), node.link(second, 1)] == [SUCCESS, SUCCESS]
    assert {link.endpoint for link in node.datadist.links()} == {
        ("127.0.0.1", first),
        ("127.0.0.1", second),
    }
    assert [node.link(first, 1), node.link(second, 1)] == [ALREADY_LINK, ALREADY_LINK]
    assert pulls(node, 1, 6), "an operation that names only the id uses the newest link"
    assert node.unlink(second, 1) == SUCCESS
    assert eventually(lambda: other.call(linked_ids) == [])
    assert peer.call(linked_ids) == [2]
    assert pulls(node, 1, 5)
    assert node.unlink(first, 1) == SUCCESS
    assert linked_ids(node) == []
    assert eventually(lambda: peer.call(linked_ids) == [])


@pytest.mark.shows("link.self")
def test_a_cluster_may_link_to_itself_but_not_pull(node: Node, path: str) -> None:
    port = node.start(LLMRole.MIX, 1, listen_ip_info="127.0.0.1:0", transfer_path=path)
    publish(node, SEED)
    assert node.link(port, 1) == SUCCESS
    assert link_list(node) == [(1, path, "", ("127.0.0.1", port))]
    assert node.link(port, 1) == ALREADY_LINK
    assert pull_status(node, 1) == PARAM_INVALID
    assert node.unlink(port, 1) == SUCCESS
    assert linked_ids(node) == []
    assert node.link(port, 1) == SUCCESS


def test_a_link_to_oneself_does_not_hide_a_peer_with_the_same_id(
    node: Node, peer: NodeProcess
) -> None:
    port = listen(peer, cluster_id=1)
    own_port = node.start(LLMRole.MIX, 1, listen_ip_info="127.0.0.1:0")
    assert node.link(own_port, 1) == SUCCESS
    assert node.link(port, 1) == SUCCESS
    assert node.unlink(own_port, 1) == SUCCESS
    assert pulls(node, 1)


@pytest.mark.shows("O34")
def test_ipv6_and_host_names_reach_a_listener(
    node: Node, peer: NodeProcess, other: NodeProcess
) -> None:
    ipv6 = listen(peer, 1, listen_ip_info="[::1]:0", transfer_path="tcp")
    named = listen(other, 3, transfer_path="tcp")
    node.start(LLMRole.DECODER, 2, transfer_path="tcp")
    assert node.link(ipv6, 1, host="::1") == SUCCESS
    assert node.link(named, 3, host="localhost") == SUCCESS
    assert pulls(node, 1)
    assert pulls(node, 3)
    assert node.link(named, 3, host="localhost") == ALREADY_LINK


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], list[str]]]:
    """A name server: what a host name stands for."""
    names: dict[str, Callable[[], list[str]]] = {}
    look_up = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        addresses = names[host]() if host in names else [host]
        return [info for address in addresses for info in look_up(address, port, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


@pytest.mark.shows("O34")
def test_all_addresses_of_a_name_are_tried(
    node: Node, peer: NodeProcess, names: dict[str, Callable[[], list[str]]]
) -> None:
    names["many.test"] = lambda: ["::1", "127.0.0.2", "127.0.0.1"]
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    assert node.link(port, 1, host="many.test") == SUCCESS
    assert pulls(node, 1)
    assert node.link(dead_port(), 3, host="many.test") == LINK_FAILED


@pytest.mark.shows("O34")
def test_an_address_of_a_name_that_is_silent_leaves_time_for_the_next(
    node: Node, peer: NodeProcess, names: dict[str, Callable[[], list[str]]]
) -> None:
    """As a host of which one network is dead: packets to it get no answer."""
    names["two.test"] = lambda: ["127.0.0.9", "127.0.0.1"]
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    with socket.create_server(("127.0.0.9", port), backlog=0), ExitStack() as stack:
        for _ in range(3):  # more than its queue takes
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.9", port))
        with takes_at_most(2 + SOON_S):
            assert node.link(port, 1, 4000, "two.test") == SUCCESS
    assert pulls(node, 1)


@pytest.mark.shows("O34")
def test_a_name_that_nobody_knows_is_link_failed(
    node: Node, names: dict[str, Callable[[], list[str]]]
) -> None:
    def unknown() -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    names["nowhere.test"] = unknown
    node.start(LLMRole.DECODER, 2)
    assert node.link(1, 3, host="nowhere.test") == LINK_FAILED


@pytest.mark.shows("link.parallel", "O34")
def test_a_name_server_that_does_not_answer_holds_up_nobody(
    node: Node, peer: NodeProcess, names: dict[str, Callable[[], list[str]]]
) -> None:
    answered = threading.Event()

    def slow() -> list[str]:
        answered.wait(30)
        return ["127.0.0.1"]

    names["slow.test"] = slow
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", transfer_path="tcp")
    publish_large(node)
    peer.call(Node.start, LLMRole.DECODER, 2, transfer_path="tcp", sync_kv_timeout=10_000)
    infos = [cluster_info(number, 3, host="slow.test") for number in range(1, 41)]
    try:
        with takes_at_most(budget_s(500)):
            statuses = node.datadist.link_clusters(infos, 500)[1]
        assert statuses == [TIMEOUT] * 40
        with takes_at_most(SOON_S):
            assert peer.call(Node.link, port, 1) == SUCCESS
            assert peer.call(pulls_large, 1)
    finally:
        answered.set()


def test_registering_after_linking_is_seen(
    node: Node, peer: NodeProcess, is_accessible: bool, path: str
) -> None:
    settings: dict[str, Any] = {
        "enable_remote_cache_accessible": is_accessible,
        "transfer_path": path,
    }
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) == SUCCESS
    assert pull_status(node, 1) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    peer.call(publish, SEED)
    assert pulls(node, 1)


# -- paths -----------------------------------------------------------------------------------------


@pytest.mark.shows("datadist.links")
def test_the_best_common_path_is_taken(node: Node, peer: NodeProcess) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    assert node.link(port, 1) == SUCCESS
    assert link_list(node) == [(1, "cma", "", ("127.0.0.1", port))]


@pytest.mark.shows("datadist.links")
def test_a_forced_path_of_one_end_decides(node: Node, peer: NodeProcess) -> None:
    port = listen(peer, transfer_path="tcp")
    node.start(LLMRole.DECODER, 2)
    assert node.link(port, 1) == SUCCESS
    ((_, path, reason, _),) = link_list(node)
    assert path == "tcp"
    assert "cma: cluster 1 does not allow it" in reason
    assert pulls(node, 1)


@pytest.mark.parametrize(("mine", "theirs"), [("cma", "tcp"), ("tcp", "cma"), ("nixl", "auto")])
def test_a_forced_path_that_the_other_end_does_not_offer_is_link_failed(
    node: Node, peer: NodeProcess, caplog: pytest.LogCaptureFixture, mine: str, theirs: str
) -> None:
    port = listen(peer, transfer_path=theirs)
    node.start(LLMRole.DECODER, 2, transfer_path=mine)
    with caplog.at_level(logging.ERROR, "LLM_DATADIST"), takes_at_most(SOON_S):
        assert node.link(port, 1) == LINK_FAILED
    assert "no path works in both directions" in caplog.text
    assert f"127.0.0.1:{port}" in caplog.text
    assert (linked_ids(node), peer.call(linked_ids)) == ([], [])
