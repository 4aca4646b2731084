"""Linking and unlinking: every result, what it leaves behind at both ends, how long it takes."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    LLMClusterInfo,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info, make_array
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUCCESS = LLMStatusCode.LLM_SUCCESS
ALREADY_LINK = LLMStatusCode.LLM_ALREADY_LINK
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
UNLINK_FAILED = LLMStatusCode.LLM_UNLINK_FAILED
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
TIMEOUT = LLMStatusCode.LLM_TIMEOUT

SEED = 5
SHAPE = (2, 8, 64)
#: takes long enough over tcp to be met in its middle
LARGE = (4, 64, 1 << 20)
LARGE_FILL = 7

#: what takes no waiting, on a busy machine
SOON_S = 2.0


@pytest.fixture(scope="module")
def other_process() -> Iterator[NodeProcess]:
    """A second process for all tests that do not harm it."""
    with NodeProcess() as process:
        yield process


@pytest.fixture
def other(other_process: NodeProcess) -> Iterator[NodeProcess]:
    yield other_process
    other_process.call(Node.stop)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Where connections are accepted by the kernel and nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock:
        yield sock.getsockname()[1]


def budget_s(timeout_ms: int) -> float:
    """A fifth over the timeout, and what two busy cores need to schedule a few processes."""
    return 1.2 * timeout_ms / 1000 + 0.1


def dead_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def listen(peer: NodeProcess, cluster_id: int = 1, seed: int = SEED, **settings: Any) -> int:
    """Starts a listening node that has one cache to pull; its port."""
    settings.setdefault("listen_ip_info", "127.0.0.1:0")
    port = peer.call(Node.start, LLMRole.PROMPT, cluster_id, **settings)
    peer.call(publish, seed)
    return port


def settings_of(is_accessible: bool, path: str) -> dict[str, Any]:
    return {"enable_remote_cache_accessible": is_accessible, "transfer_path": path}


def publish(node: Node, seed: int) -> None:
    node.blocks_cache(*SHAPE, seed=seed, key=BlocksCacheKey(0, 0))


def pulls(node: Node, cluster_id: int, seed: int = SEED) -> bool:
    """Whether a pull from that cluster moves the right bytes."""
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, [0, 7, 3], [5, 1, 2])
    expected = make_array(SHAPE, seed)[:, [0, 7, 3]]
    right = np.array_equal(node.arrays[cache.cache_id][:, [5, 1, 2]], expected)
    node.manager.unregister_cache(cache.cache_id)
    return right


def pull_status(node: Node, cluster_id: int, seed: int = SEED) -> LLMStatusCode:
    """SUCCESS for the right bytes."""
    try:
        assert pulls(node, cluster_id, seed)
    except LLMException as error:
        return error.status_code
    return SUCCESS


def linked_ids(node: Node) -> list[int]:
    return sorted(link.cluster_id for link in node.datadist.links())


def link_list(node: Node) -> list[tuple[int, str, str, tuple[str, int] | None]]:
    return [tuple(link) for link in node.datadist.links()]  # type: ignore[misc]


def publish_large(node: Node) -> None:
    cache = node.blocks_cache(*LARGE, key=BlocksCacheKey(0, 1))
    node.arrays[cache.cache_id][:] = LARGE_FILL


def pulls_large(node: Node, cluster_id: int) -> bool:
    cache = node.blocks_cache(*LARGE)
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 1), cache, [1, 2, 3], [4, 5, 6])
    return bool((node.arrays[cache.cache_id][:, 4:7] == LARGE_FILL).all())


def descriptors(_: Node) -> int:
    return len(os.listdir("/proc/self/fd"))


def unlink_id(node: Node, cluster_id: int, *, force: bool) -> LLMStatusCode:
    """Unlinks as a listener does that never knew its caller's address."""
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    if not force:
        info.append_remote_ip_info("127.0.0.1", 1)
    return node.datadist.unlink_clusters([info], 3000, force)[1][0]


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


def test_a_listener_tells_two_callers_with_one_cluster_id_apart(
    node: Node, peer: NodeProcess, other: NodeProcess
) -> None:
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    publish(node, SEED)
    for process in (peer, other):
        process.call(Node.start, LLMRole.DECODER, 2)
        assert process.call(Node.link, port, 1) == SUCCESS
    assert linked_ids(node) == [2, 2]
    assert peer.call(pulls, 1)
    assert peer.call(Node.unlink, port, 1) == SUCCESS
    assert eventually(lambda: linked_ids(node) == [2])
    assert other.call(pulls, 1)


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


# -- links that cannot be --------------------------------------------------------------------------


@pytest.mark.shows("link.refused", "error.17", "relies.4")
def test_nobody_listens(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.start(LLMRole.DECODER, 2)
    port = dead_port()
    with caplog.at_level(logging.ERROR, "LLM_DATADIST"), takes_at_most(SOON_S):
        assert node.link(port, 1) == LINK_FAILED
    assert f"cannot connect to 127.0.0.1:{port}" in caplog.text
    assert linked_ids(node) == []


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


# -- unlinking -------------------------------------------------------------------------------------


@pytest.mark.shows("datadist.unlink_clusters")
def test_both_ends_see_a_graceful_unlink(
    node: Node, peer: NodeProcess, is_accessible: bool, path: str
) -> None:
    settings: dict[str, Any] = {
        "enable_remote_cache_accessible": is_accessible,
        "transfer_path": path,
    }
    port = listen(peer, **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    publish(node, 9)
    for _ in range(3):
        assert node.link(port, 1) == SUCCESS
        assert pulls(node, 1)
        assert peer.call(pulls, 2, 9)
        with takes_at_most(SOON_S):
            assert node.datadist.unlink_clusters([cluster_info(port, 1)]) == (SUCCESS, [SUCCESS])
        assert linked_ids(node) == []
        assert pull_status(node, 1) == NOT_YET_LINK
        assert peer.call(pull_status, 2, 9) == NOT_YET_LINK
        assert eventually(lambda: peer.call(linked_ids) == [])


@pytest.mark.shows("datadist.unlink_clusters", "datadist.unlink_clusters.force", "relies.5")
@pytest.mark.parametrize("force", [False, True])
def test_a_listener_unlinks_its_caller(node: Node, peer: NodeProcess, force: bool) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    for _ in range(3):
        assert node.link(port, 1) == SUCCESS
        assert peer.call(unlink_id, 2, force=force) == SUCCESS
        assert peer.call(linked_ids) == []
        assert eventually(lambda: linked_ids(node) == [])
        assert pull_status(node, 1) == NOT_YET_LINK


@pytest.mark.shows("datadist.unlink_clusters.force", "relies.5")
def test_force_unlinks_a_live_peer_at_once_and_it_notices(node: Node, peer: NodeProcess) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    for _ in range(10):
        assert node.link(port, 1) == SUCCESS
        assert pulls(node, 1)
        with takes_at_most(0.5):
            assert unlink_id(node, 1, force=True) == SUCCESS
        assert peer.call(unlink_id, 2, force=True) == SUCCESS, "as samples do, at both ends"
        assert linked_ids(node) == []
        assert pull_status(node, 1) == NOT_YET_LINK
        assert eventually(lambda: peer.call(linked_ids) == [])


@pytest.mark.shows("link.again_after_crash")
def test_a_peer_unlinked_by_force_is_linked_again_at_once(node: Node, peer: NodeProcess) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    for _ in range(20):  # the peer may not have noticed yet: it must not say ALREADY_LINK
        assert node.link(port, 1) == SUCCESS
        assert unlink_id(node, 1, force=True) == SUCCESS
    assert node.link(port, 1) == SUCCESS
    assert pulls(node, 1)
    assert eventually(lambda: peer.call(linked_ids) == [2])


@pytest.mark.shows("datadist.unlink_clusters.force", "relies.5")
@pytest.mark.parametrize("was_linked", [False, True])
def test_force_unlinks_what_is_dead_or_unknown(
    node: Node, victim: NodeProcess, was_linked: bool
) -> None:
    node.start(LLMRole.DECODER, 2)
    port = listen(victim)
    if was_linked:
        assert node.link(port, 1) == SUCCESS
    victim.kill()
    with takes_at_most(0.5):
        assert unlink_id(node, 1, force=True) == SUCCESS
        assert node.unlink(port, 1, force=True) == SUCCESS
    assert linked_ids(node) == []


def test_force_does_not_wait_for_a_peer_that_stands_still(node: Node, victim: NodeProcess) -> None:
    port = listen(victim)
    node.start(LLMRole.DECODER, 2)
    assert node.link(port, 1) == SUCCESS
    victim.pause()
    with takes_at_most(0.5):
        assert unlink_id(node, 1, force=True) == SUCCESS
    assert linked_ids(node) == []


@pytest.mark.shows("error.17", "error.19")
def test_unlinking_what_is_not_linked(node: Node, peer: NodeProcess, silent_port: int) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    assert node.unlink(port, 1) == SUCCESS
    with takes_at_most(SOON_S):
        assert node.unlink(dead_port(), 1) == UNLINK_FAILED
    with takes_at_most(budget_s(300)):
        assert node.unlink(silent_port, 1, 300) == TIMEOUT


@pytest.mark.shows("unlink.peer_gone")
def test_unlinking_a_peer_that_died_says_so(node: Node, victim: NodeProcess) -> None:
    port = listen(victim)
    node.start(LLMRole.DECODER, 2)
    assert node.link(port, 1) == SUCCESS
    victim.kill()
    assert eventually(lambda: linked_ids(node) == [])
    with takes_at_most(SOON_S):
        assert node.unlink(port, 1) == UNLINK_FAILED


def test_both_ends_may_unlink_at_once(node: Node, peer: NodeProcess) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    for _ in range(10):
        assert node.link(port, 1) == SUCCESS
        peer.begin(unlink_id, 2, force=False)
        with takes_at_most(SOON_S):
            assert node.unlink(port, 1) == SUCCESS
        # it cannot reach its caller if the link was gone already
        assert peer.result() in (SUCCESS, UNLINK_FAILED)
        assert eventually(lambda: (linked_ids(node), peer.call(linked_ids)) == ([], []))


@pytest.mark.shows("unlink.waits", "datadist.unlink_clusters")
def test_unlink_waits_for_a_running_pull(node: Node, victim: NodeProcess) -> None:
    port = listen(victim, transfer_path="tcp")
    victim.call(publish_large)
    node.start(LLMRole.DECODER, 2, transfer_path="tcp", sync_kv_timeout=20000)
    assert node.link(port, 1) == SUCCESS
    cache = node.blocks_cache(*LARGE)
    array, blocks = node.arrays[cache.cache_id], list(range(LARGE[1]))
    with ThreadPoolExecutor(32) as pool:
        pull = pool.submit(node.manager.pull_blocks, BlocksCacheKey(1, 1), cache, blocks, blocks)
        assert eventually(lambda: bool(array[0, 0, 0] == LARGE_FILL))
        victim.pause()
        assert array[-1, -1, -1] == 0, "the pull must be in its middle"
        with takes_at_most(budget_s(500)):
            assert node.unlink(port, 1, 500) == TIMEOUT
        assert linked_ids(node) == [1]
        unlink = pool.submit(node.unlink, port, 1, 20000)
        assert eventually(lambda: is_refused_at_once(pool, node))
        assert not unlink.done()
        victim.resume()
        assert unlink.result() == SUCCESS
        assert pull.done()
        pull.result()
    assert (array == LARGE_FILL).all()
    assert pull_status(node, 1) == NOT_YET_LINK
    assert eventually(lambda: victim.call(linked_ids) == [])
    assert node.link(port, 1) == SUCCESS


def is_refused_at_once(pool: ThreadPoolExecutor, node: Node) -> bool:
    """Whether another pull gets no further; one that was in time waits with the first."""
    pull = pool.submit(pull_status, node, 1)
    wait([pull], 0.3)
    return pull.done() and pull.result() == NOT_YET_LINK


@pytest.mark.shows("unlink.waits")
def test_a_peer_that_unlinks_waits_for_our_running_pull(node: Node, victim: NodeProcess) -> None:
    port = listen(victim, transfer_path="tcp")
    victim.call(publish_large)
    node.start(LLMRole.DECODER, 2, transfer_path="tcp", sync_kv_timeout=20000)
    assert node.link(port, 1) == SUCCESS
    cache = node.blocks_cache(*LARGE)
    array, blocks = node.arrays[cache.cache_id], list(range(LARGE[1]))
    with ThreadPoolExecutor(1) as pool:
        pull = pool.submit(node.manager.pull_blocks, BlocksCacheKey(1, 1), cache, blocks, blocks)
        assert eventually(lambda: bool(array[0, 0, 0] == LARGE_FILL))
        assert array[-1, -1, -1] == 0, "the pull must be in its middle"
        assert victim.call(unlink_id, 2, force=False) == SUCCESS
        pull.result()
    assert (array == LARGE_FILL).all()
    assert victim.call(linked_ids) == []
    assert eventually(lambda: linked_ids(node) == [])
