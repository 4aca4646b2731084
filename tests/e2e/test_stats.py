"""LLMDataDist.stats: what a cluster says of itself, and what it counts when metrics are on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    DataType,
    LayerSynchronizer,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
    TransferWithCacheKeyConfig,
)
from llm_datadist.peer.streams import MAX_STREAMS
from llm_datadist.testing.cluster import Node
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from llm_datadist.core.stats import ClusterStats, OperationStats
    from llm_datadist.testing.cluster import NodeProcess

SUCCESS = LLMStatusCode.LLM_SUCCESS
KEY = BlocksCacheKey(1, 0)
SHAPE = (2, 8, 4096)
POOL = '{"memory_size": 1048576}'


def own_blocks(node: Node) -> int:
    return node.blocks_cache(*SHAPE, seed=1, key=KEY).cache_id


def stats_of(node: Node) -> ClusterStats:
    return node.datadist.stats()


def link(node: Node, peer: NodeProcess, **settings: Any) -> int:
    """Cluster 2 here, linked to cluster 1 there, which owns blocks; the port of the latter."""
    settings = {"enable_remote_cache_accessible": True, "metrics": True, **settings}
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    peer.call(own_blocks)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) == SUCCESS
    return port


def find(stats: ClusterStats, operation: str, path: str | None = None) -> OperationStats:
    [found] = [
        each
        for each in stats.operations
        if each.operation == operation and path in (None, each.path)
    ]
    return found


# -- what needs no counting --


def test_there_are_no_stats_before_init() -> None:
    with pytest.raises(RuntimeError, match="not initialized"):
        LLMDataDist(LLMRole.DECODER, 1).stats()


def test_without_metrics_it_says_what_there_is(node: Node, peer: NodeProcess, path: str) -> None:
    port = link(node, peer, metrics=False, transfer_path=path, mem_pool_cfg=POOL)
    node.blocks_cache(*SHAPE, key=BlocksCacheKey(2, 0))
    stats = stats_of(node)
    assert (stats.cluster_id, stats.num_links, stats.is_counting) == (2, 1, False)
    assert (stats.num_caches, stats.num_keys, stats.oldest_key) == (1, 1, None)
    [ours] = stats.links
    assert (ours.peer, ours.path, ours.state, ours.num_running) == (1, path, "linked", 0)
    assert ours.endpoint == f"127.0.0.1:{port}"
    [pool] = stats.pools
    assert (pool.placement, pool.capacity_nbytes, pool.used_nbytes) == ("DEVICE", 2**20, 0)
    assert (stats.operations, stats.waits, stats.link_events) == ((), (), ())


def test_a_snapshot_cannot_be_changed(node: Node) -> None:
    node.start(LLMRole.DECODER, 2)
    stats: Any = stats_of(node)
    with pytest.raises(AttributeError):
        stats.num_links = 7


def test_the_oldest_key_is_the_one_that_holds_pool_memory_longest(node: Node) -> None:
    node.start(LLMRole.PROMPT, 1, mem_pool_cfg=POOL)
    node.blocks_cache(*SHAPE, key=KEY)  # registered: it holds nothing
    desc = CacheDesc(1, [2, 64], DataType.DT_INT8, Placement.DEVICE)
    first = node.manager.allocate_cache(desc, [CacheKey(1, req_id=7, model_id=3)])
    node.manager.allocate_cache(desc, [CacheKey(1, req_id=8, model_id=3)])
    held = stats_of(node).oldest_key
    assert held is not None
    assert (held.cache_id, held.id, held.model_id, held.is_prefix) == (first.cache_id, 7, 3, False)
    assert stats_of(node).num_keys == 3
    age_s = held.age_s
    later = stats_of(node).oldest_key
    assert later is not None
    assert 0 <= age_s < later.age_s
    node.manager.remove_cache_key(CacheKey(1, req_id=7, model_id=3))
    held = stats_of(node).oldest_key
    assert held is not None
    assert held.id == 8
    assert stats_of(node).pools[0].used_nbytes > 0


# -- counting --


def test_a_pull_is_counted_by_peer_path_and_status(
    node: Node, peer: NodeProcess, path: str, is_accessible: bool
) -> None:
    link(node, peer, transfer_path=path, enable_remote_cache_accessible=is_accessible)
    cache = node.blocks_cache(*SHAPE)
    for _ in range(3):
        node.manager.pull_blocks(KEY, cache, [1, 4], [0, 2])
    for _ in range(2):
        with pytest.raises(LLMException, match="out of range"):
            node.manager.pull_blocks(KEY, cache, [1, 9], [0, 2])
    pulled = find(stats_of(node), "pull")
    assert (pulled.peer, pulled.path, pulled.succeeded) == (1, path, 3)
    assert pulled.failures == (("LLM_PARAM_INVALID", 2),)
    assert (pulled.nbytes, pulled.num_segments) == (3 * 2 * 2 * 4096, 3 * 2 * 2)
    counts = [h.count for h in (pulled.duration, pulled.lookup, pulled.plan, pulled.transfer)]
    assert counts == [5, 5, 3, 3]
    parts_s = pulled.lookup.total_s + pulled.plan.total_s + pulled.transfer.total_s
    assert 0 < parts_s <= pulled.duration.total_s
    assert stats_of(node).link_events[0].made == 1


def test_an_owner_counts_what_it_sends_over_tcp(node: Node, peer: NodeProcess) -> None:
    link(node, peer, transfer_path="tcp")
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(KEY, cache, [1, 4], [0, 2])
    served = find(peer.call(stats_of), "serve")
    assert (served.peer, served.path, served.nbytes) == (2, "tcp", 2 * 2 * 4096)


def test_a_push_is_counted_on_both_ends(node: Node, peer: NodeProcess, path: str) -> None:
    link(node, peer, transfer_path=path)
    cache = node.blocks_cache(*SHAPE, seed=2)
    node.manager.push_blocks(KEY, cache, [1, 4], [0, 2])
    pushed, fetched = find(stats_of(node), "push"), find(peer.call(stats_of), "fetch")
    assert (pushed.peer, pushed.succeeded) == (1, 1)
    assert (fetched.peer, fetched.succeeded) == (2, 1)
    assert pushed.nbytes == fetched.nbytes == 2 * 2 * 4096


def test_without_a_link_the_failure_is_counted(node: Node) -> None:
    node.start(LLMRole.DECODER, 2, metrics=True)
    cache = node.blocks_cache(*SHAPE)
    with pytest.raises(LLMException):
        node.manager.pull_blocks(KEY, cache, [1], [0])
    pulled = find(stats_of(node), "pull")
    assert (pulled.peer, pulled.path, pulled.succeeded) == (1, "", 0)
    assert pulled.failures == (("LLM_NOT_YET_LINK", 1),)


class AtOnce(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def test_the_layers_of_a_transfer_are_pushes(node: Node, peer: NodeProcess) -> None:
    link(node, peer)
    cache = node.blocks_cache(4, 8, 4096)
    peer.call(add_four_tensors)
    config = TransferWithCacheKeyConfig(BlocksCacheKey(1, 4), range(2), range(2))
    task = node.manager.transfer_cache_async(cache, AtOnce(), [config], [1], [2])
    assert task.synchronize() == SUCCESS
    stats = stats_of(node)
    assert find(stats, "transfer").succeeded == 1
    assert (find(stats, "push").succeeded, find(stats, "push").nbytes) == (2, 4 * 4096)


def add_four_tensors(node: Node) -> int:
    return node.blocks_cache(4, 8, 4096, key=BlocksCacheKey(1, 4)).cache_id


def test_copies_links_and_unlinks_are_counted(node: Node, peer: NodeProcess) -> None:
    port = link(node, peer)
    cache = node.blocks_cache(*SHAPE)
    node.manager.copy_blocks(cache, {1: [2, 3]})
    assert node.link(port, 1) == LLMStatusCode.LLM_ALREADY_LINK
    assert node.unlink(port, 1) == SUCCESS
    stats = stats_of(node)
    assert find(stats, "copy").nbytes == 2 * 2 * 4096
    assert (find(stats, "link").succeeded, find(stats, "link").failures) == (
        1, (("LLM_ALREADY_LINK", 1),)
    )  # fmt: skip
    assert find(stats, "unlink").succeeded == 1
    [events] = stats.link_events
    assert (events.made, events.ended) == (1, 1)


def test_transfers_that_run_show_and_what_waits_is_counted(node: Node, victim: NodeProcess) -> None:
    """One thread too many waits for a stream, and unlinking waits for all of them."""
    port = link(node, victim, transfer_path="tcp", sync_kv_timeout=800)
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(KEY, cache, [1], [0])
    victim.pause()

    def pull() -> LLMStatusCode:
        with pytest.raises(LLMException) as error:
            node.manager.pull_blocks(KEY, cache, [1], [0])
        return error.value.status_code

    count = MAX_STREAMS + 1
    with ThreadPoolExecutor(count) as threads:
        pulls = [threads.submit(pull) for _ in range(count)]
        assert eventually(lambda: stats_of(node).links[0].num_running == count)
        node.unlink(port, 1, 2000)
    victim.resume()
    assert {each.result() for each in pulls} == {LLMStatusCode.LLM_TIMEOUT}
    waits = {each.waited_for: each.duration for each in stats_of(node).waits}
    assert waits["gate"].count == 1
    assert waits["stream"].count >= 1
    assert waits["stream"].total_s > 0
