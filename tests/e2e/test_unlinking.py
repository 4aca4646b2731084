"""Unlinking: every result, what it leaves behind at both ends, how long it takes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import linking
import pytest
from linking import (
    LARGE,
    LARGE_FILL,
    NOT_YET_LINK,
    SOON_S,
    SUCCESS,
    TIMEOUT,
    UNLINK_FAILED,
    budget_s,
    dead_port,
    linked_ids,
    listen,
    publish,
    publish_large,
    pull_status,
    pulls,
    unlink_id,
)

from llm_datadist import (
    BlocksCacheKey,
    LLMRole,
)
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually, takes_at_most

silent_port = linking.silent_port
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
    cache = node.blocks_cache(*LARGE)
    array, blocks = node.arrays[cache.cache_id], list(range(LARGE[1]))
    with FaultProxy(port) as proxy, ThreadPoolExecutor(32) as pool:
        assert node.link(proxy.port, 1) == SUCCESS
        proxy.slow(array.nbytes)
        pull = pool.submit(node.manager.pull_blocks, BlocksCacheKey(1, 1), cache, blocks, blocks)
        assert eventually(lambda: bool(array[0, 0, 0] == LARGE_FILL))
        victim.pause()
        assert array[-1, -1, -1] == 0, "the pull must be in its middle"
        with takes_at_most(budget_s(500)):
            assert node.unlink(proxy.port, 1, 500) == TIMEOUT
        assert linked_ids(node) == [1]
        unlink = pool.submit(node.unlink, proxy.port, 1, 20000)
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
    cache = node.blocks_cache(*LARGE)
    array, blocks = node.arrays[cache.cache_id], list(range(LARGE[1]))
    with FaultProxy(port) as proxy, ThreadPoolExecutor(1) as pool:
        assert node.link(proxy.port, 1) == SUCCESS
        proxy.slow(array.nbytes)
        pull = pool.submit(node.manager.pull_blocks, BlocksCacheKey(1, 1), cache, blocks, blocks)
        assert eventually(lambda: bool(array[0, 0, 0] == LARGE_FILL))
        assert array[-1, -1, -1] == 0, "the pull must be in its middle"
        assert victim.call(unlink_id, 2, force=False) == SUCCESS
        pull.result()
    assert (array == LARGE_FILL).all()
    assert victim.call(linked_ids) == []
    assert eventually(lambda: linked_ids(node) == [])
