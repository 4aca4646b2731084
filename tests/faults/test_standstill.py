"""SIGSTOP: peers that stand still, for longer than any timeout. Each with a time budget."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from wire import Wire

from llm_datadist import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    LLMStatusCode,
    TransferWithCacheKeyConfig,
)
from llm_datadist.testing.cluster import Node, NodeProcess, addrs_of
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SUCCESS = LLMStatusCode.LLM_SUCCESS
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK

SYNC_TIMEOUT_MS = 500
#: a fifth over the timeout, and what two busy cores need to schedule a few processes
BUDGET_S = 1.2 * SYNC_TIMEOUT_MS / 1000 + 0.1
SOON_S = 2.0
SHAPE = (2, 8, 4096)
#: more than the sockets between two processes hold
LARGE = (4, 16, 1 << 18)
#: takes long enough to be met in its middle
HUGE = (4, 64, 1 << 19)


def start(
    process: NodeProcess, cluster_id: int = 1, shape: tuple[int, int, int] = SHAPE, **settings: Any
) -> int:
    """Starts an owner of one cache, filled with its cluster id."""
    settings = {"listen_ip_info": "127.0.0.1:0", "sync_kv_timeout": SYNC_TIMEOUT_MS, **settings}
    port = process.call(Node.start, LLMRole.PROMPT, cluster_id, **settings)
    process.call(own, cluster_id, shape)
    return port


def own(node: Node, fill: int, shape: tuple[int, int, int]) -> None:
    cache = node.blocks_cache(*shape, key=BlocksCacheKey(0, 0))
    node.arrays[cache.cache_id][:] = fill


def pull(node: Node, cluster_id: int, shape: tuple[int, int, int] = SHAPE) -> LLMStatusCode:
    """SUCCESS when all bytes of the peer's cache came, and are right."""
    cache = node.blocks_cache(*shape)
    blocks = list(range(shape[1]))
    try:
        node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, blocks, blocks)
        assert (node.arrays[cache.cache_id] == cluster_id).all()
    except LLMException as error:
        return error.status_code
    finally:
        node.manager.unregister_cache(cache.cache_id)
        del node.arrays[cache.cache_id], node.caches[cache.cache_id]
    return SUCCESS


@pytest.mark.shows("pull.timeout", "error.49", "D12")
@pytest.mark.parametrize(("path", "is_accessible"), [("cma", False), ("tcp", False), ("tcp", True)])
def test_an_owner_that_stands_still_is_a_timeout_and_no_end(
    node: Node, peer: NodeProcess, victim: NodeProcess, path: str, is_accessible: bool
) -> None:
    settings: dict[str, Any] = {
        "transfer_path": path,
        "enable_remote_cache_accessible": is_accessible,
    }
    port, other_port = start(victim, 1, **settings), start(peer, 3, **settings)
    node.start(LLMRole.DECODER, 2, sync_kv_timeout=SYNC_TIMEOUT_MS, **settings)
    assert [node.link(port, 1), node.link(other_port, 3)] == [SUCCESS, SUCCESS]
    assert pull(node, 1) == SUCCESS
    victim.pause()
    with ThreadPoolExecutor(4) as pool:
        pulling = [pool.submit(timed_pull, node, 1) for _ in range(4)]
        while not all(call.done() for call in pulling):
            assert pull(node, 3) == SUCCESS
    for status, took in (call.result() for call in pulling):
        assert status == TIMEOUT
        assert SYNC_TIMEOUT_MS / 1000 <= took <= BUDGET_S
    assert sorted(link.cluster_id for link in node.datadist.links()) == [1, 3]
    victim.resume()
    assert pull(node, 1) == SUCCESS, "the same link"


def timed_pull(node: Node, cluster_id: int) -> tuple[LLMStatusCode, float]:
    begun = time.monotonic()
    return pull(node, cluster_id), time.monotonic() - begun


def test_one_sided_pulls_do_not_need_the_owner_at_all(node: Node, victim: NodeProcess) -> None:
    settings: dict[str, Any] = {"transfer_path": "cma", "enable_remote_cache_accessible": True}
    port = start(victim, 1, **settings)
    node.start(LLMRole.DECODER, 2, sync_kv_timeout=SYNC_TIMEOUT_MS, **settings)
    assert node.link(port, 1) == SUCCESS
    assert pull(node, 1) == SUCCESS
    victim.pause()
    for _ in range(3):
        assert pull(node, 1) == SUCCESS


@pytest.mark.shows("D13", "unlink.peer_gone", "link.both_rolled_back")
def test_unlinking_and_relinking_a_peer_that_stands_still(node: Node, victim: NodeProcess) -> None:
    port = start(victim)
    node.start(LLMRole.DECODER, 2, sync_kv_timeout=SYNC_TIMEOUT_MS)
    assert node.link(port, 1) == SUCCESS
    victim.pause()
    assert pull(node, 1) == TIMEOUT
    with takes_at_most(BUDGET_S):
        assert node.unlink(port, 1, SYNC_TIMEOUT_MS) == TIMEOUT
    assert [link.cluster_id for link in node.datadist.links()] == [1], "the link is kept"
    with takes_at_most(BUDGET_S):
        assert node.link(port, 1, SYNC_TIMEOUT_MS) == TIMEOUT
    assert node.unlink(port, 1, force=True) == SUCCESS
    with takes_at_most(BUDGET_S):
        assert node.link(port, 1, SYNC_TIMEOUT_MS) == TIMEOUT
    assert node.datadist.links() == []
    victim.resume()
    assert node.link(port, 1) == SUCCESS
    assert pull(node, 1) == SUCCESS
    assert eventually(lambda: len(victim.call(links_of)) == 1), "what was left undone is dropped"


def links_of(node: Node) -> list[int]:
    return [link.cluster_id for link in node.datadist.links()]


def test_an_unlink_that_timed_out_may_end_the_link_later_but_at_both_ends(
    node: Node, victim: NodeProcess
) -> None:
    port = start(victim)
    node.start(LLMRole.DECODER, 2, sync_kv_timeout=SYNC_TIMEOUT_MS)
    assert node.link(port, 1) == SUCCESS
    victim.pause()
    assert node.unlink(port, 1, 300) == TIMEOUT
    victim.resume()
    assert eventually(lambda: links_of(node) == [] == victim.call(links_of))
    assert pull(node, 1) == NOT_YET_LINK
    assert node.link(port, 1) == SUCCESS
    assert pull(node, 1) == SUCCESS


def test_nothing_arrives_after_a_pull_has_timed_out(node: Node, victim: NodeProcess) -> None:
    port = start(victim, 1, HUGE, transfer_path="tcp")
    node.start(LLMRole.DECODER, 2, transfer_path="tcp", sync_kv_timeout=1000)
    cache = node.blocks_cache(*HUGE)
    array, blocks = node.arrays[cache.cache_id], list(range(HUGE[1]))
    with FaultProxy(port) as proxy, ThreadPoolExecutor(1) as pool:
        assert node.link(proxy.port, 1) == SUCCESS
        proxy.slow(array.nbytes / 2)  # a pull takes longer than the timeout
        pulling = pool.submit(node.manager.pull_blocks, BlocksCacheKey(1, 0), cache, blocks, blocks)
        begun = time.monotonic()
        assert eventually(lambda: bool(array[0, 0, 0] == 1))
        victim.pause()
        assert not array.all(), "the pull must be in its middle"
        with pytest.raises(LLMException) as error:
            pulling.result(10)
        assert time.monotonic() - begun <= 1.2 + 0.1
        assert error.value.status_code == TIMEOUT
        array[:] = 0xEE
        victim.resume()
        proxy.restore()
        assert pull(node, 1, HUGE) == SUCCESS
        assert (array == 0xEE).all()


def test_a_large_question_does_not_take_longer_than_the_timeout(
    node: Node, victim: NodeProcess
) -> None:
    """Many thousand segments: a request that the sockets' buffers do not hold."""
    shape = (16, 16384, 8)
    port = start(victim, 1, shape, transfer_path="tcp")
    node.start(LLMRole.DECODER, 2, transfer_path="tcp", sync_kv_timeout=2000)
    assert node.link(port, 1) == SUCCESS
    cache = node.blocks_cache(*shape)
    blocks = list(range(0, 16384, 2))
    node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, blocks, blocks)
    assert (node.arrays[cache.cache_id][:, ::2] == 1).all()
    victim.pause()
    with takes_at_most(1.2 * 2 + 0.1), pytest.raises(LLMException) as error:
        node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, blocks, blocks)
    assert error.value.status_code == TIMEOUT


def test_a_stream_that_cannot_be_opened_is_a_timeout(node: Node, victim: NodeProcess) -> None:
    """The backlog of the owner, which stands still, is full of other people's connections."""
    port = start(victim, transfer_path="tcp")
    node.start(LLMRole.DECODER, 2, transfer_path="tcp", sync_kv_timeout=SYNC_TIMEOUT_MS)
    assert node.link(port, 1) == SUCCESS
    victim.pause()
    assert pull(node, 1) == TIMEOUT
    with ExitStack() as stack:
        for _ in range(600):
            stack.enter_context(Wire.begin_to_dial(port))
        for _ in range(3):
            with takes_at_most(BUDGET_S):
                assert pull(node, 1) == TIMEOUT
    victim.resume()
    assert eventually(lambda: pull(node, 1) == SUCCESS, 15)


def test_a_puller_that_stands_still_leaves_the_owner_to_others(
    node: Node, peer: NodeProcess, victim: NodeProcess
) -> None:
    """It is in the middle of more pulls than the owner has threads to answer with."""
    settings = {"transfer_path": "tcp", "sync_kv_timeout": 60_000}
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    own(node, 1, LARGE)
    for process, cluster_id in ((victim, 2), (peer, 3)):
        process.call(Node.start, LLMRole.DECODER, cluster_id, **settings)
        assert process.call(Node.link, port, 1) == SUCCESS
    addresses = victim.call(destinations, 24)
    victim.begin(pull_into_all, 1)
    assert eventually(lambda: all(peek(victim.pid, address) == 1 for address in addresses[:8]), 20)
    victim.pause()
    for _ in range(3):
        with takes_at_most(SOON_S):
            assert peer.call(pull, 1, LARGE) == SUCCESS
    with takes_at_most(SOON_S):
        assert peer.call(Node.unlink, port, 1) == SUCCESS
        assert peer.call(Node.link, port, 1) == SUCCESS
    victim.resume()
    assert victim.result(40) == 24


def destinations(node: Node, count: int) -> list[int]:
    """The first bytes of so many empty caches."""
    caches = [node.blocks_cache(*LARGE) for _ in range(count)]
    return [addrs_of(node.arrays[cache.cache_id])[0] for cache in caches]


def pull_into_all(node: Node, cluster_id: int) -> int:
    """Fills all caches side by side; how many are right then."""
    blocks = list(range(LARGE[1]))
    with ThreadPoolExecutor(len(node.caches)) as pool:
        calls = [
            pool.submit(
                node.manager.pull_blocks, BlocksCacheKey(cluster_id, 0), cache, blocks, blocks
            )
            for cache in node.caches.values()
        ]
        for call in calls:
            call.result()
    return sum(bool((array == cluster_id).all()) for array in node.arrays.values())


def peek(pid: int, address: int) -> int:
    """One byte of another process."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(1)[0]


def test_a_pusher_that_stands_still_leaves_the_receiver_to_others(
    node: Node, peer: NodeProcess, victim: NodeProcess
) -> None:
    settings: dict[str, Any] = {
        "transfer_path": "tcp",
        "sync_kv_timeout": 60_000,
        "enable_remote_cache_accessible": True,
    }
    port = node.start(LLMRole.DECODER, 1, listen_ip_info="127.0.0.1:0", **settings)
    for model_id in range(25):
        node.blocks_cache(*LARGE, key=BlocksCacheKey(0, model_id))
    for process, cluster_id in ((victim, 2), (peer, 3)):
        process.call(Node.start, LLMRole.PROMPT, cluster_id, **settings)
        assert process.call(Node.link, port, 1) == SUCCESS
        process.call(own, cluster_id, LARGE)
    victim.begin(push_to_all, range(24))
    arrays = list(node.arrays.values())
    assert eventually(lambda: sum(bool(array[0, 0, 0]) for array in arrays) >= 4, 20)
    victim.pause()
    for _ in range(3):
        with takes_at_most(SOON_S):
            peer.call(push_to_all, [24])
    assert (arrays[24] == 3).all()
    victim.resume()
    victim.result(40)
    assert all((array == 2).all() for array in arrays[:24])


def push_to_all(node: Node, model_ids: Sequence[int]) -> None:
    """Fills these caches of cluster 1 from our only one, side by side."""
    (cache,) = node.caches.values()
    blocks = list(range(LARGE[1]))
    with ThreadPoolExecutor(len(model_ids)) as pool:
        calls = [
            pool.submit(
                node.manager.push_blocks, BlocksCacheKey(1, model_id), cache, blocks, blocks
            )
            for model_id in model_ids
        ]
        for call in calls:
            call.result()


@pytest.mark.shows("pull.timeout", "D12")
@pytest.mark.parametrize("path", ["cma", "tcp"])
def test_a_receiver_that_stands_still_is_a_timeout(
    node: Node, victim: NodeProcess, path: str
) -> None:
    """Of a push, and of each layer of a transfer; once it goes on, so does the link."""
    settings: dict[str, Any] = {"transfer_path": path, "enable_remote_cache_accessible": True}
    port = start(victim, 1, **settings)
    victim.call(own_rows)
    node.start(LLMRole.PROMPT, 2, sync_kv_timeout=SYNC_TIMEOUT_MS, **settings)
    assert node.link(port, 1) == SUCCESS
    blocks, rows = node.blocks_cache(*SHAPE, seed=1), node.rows_cache(*SHAPE, seed=2)
    key = BlocksCacheKey(1, 0)
    pushes: list[Callable[[], None]] = [
        lambda: node.manager.push_blocks(key, blocks, [0, 1], [2, 3]),
        lambda: node.manager.push_cache(CacheKeyByIdAndIndex(1, 2), rows),
    ]
    for push in pushes:
        push()
    victim.pause()
    for push in pushes:
        with takes_at_most(BUDGET_S), pytest.raises(LLMException) as error:
            push()
        assert error.value.status_code == TIMEOUT
    configs = [
        TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(1, 2), range(1), range(1), row)
        for row in range(2)
    ]
    with takes_at_most(2 * BUDGET_S):
        task = node.manager.transfer_cache_async(rows, EachLayer(), configs)
        assert task.get_results(20_000) == [TIMEOUT, TIMEOUT]
        assert task.synchronize() == TIMEOUT
    victim.resume()
    for push in pushes:
        push()


def own_rows(node: Node) -> None:
    """Cache 2."""
    node.rows_cache(*SHAPE)


class EachLayer(LayerSynchronizer):
    """Has every layer ready."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True
