"""Pushing between two processes: at once, and layer by layer."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, addrs_of, make_array

SHAPE = (6, 8, 64)


@dataclass
class Pair:
    """A prefill node here, linked to a decode node (cluster 1) in another process."""

    node: Node
    peer: NodeProcess

    def theirs(self, cache_id: int) -> Bytes:
        return self.peer.call(array_of, cache_id)


def make_pair(node: Node, peer: NodeProcess, path: str, *, is_accessible: bool) -> Pair:
    settings = {"enable_remote_cache_accessible": is_accessible, "transfer_path": path}
    port = peer.call(Node.start, LLMRole.DECODER, 1, listen_ip_info="127.0.0.1:0", **settings)
    node.start(LLMRole.PROMPT, 2, **settings)
    assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
    return Pair(node, peer)


@pytest.fixture
def pair(node: Node, peer: NodeProcess, path: str) -> Pair:
    return make_pair(node, peer, path, is_accessible=True)


@pytest.fixture
def two_sided(node: Node, peer: NodeProcess, path: str) -> Pair:
    return make_pair(node, peer, path, is_accessible=False)


def array_of(node: Node, cache_id: int) -> Bytes:
    return node.arrays[cache_id]


def add_blocks(node: Node, *args: object, **kwargs: object) -> int:
    return node.blocks_cache(*args, **kwargs).cache_id  # type: ignore[arg-type]


def add_rows(node: Node, *args: object, **kwargs: object) -> int:
    return node.rows_cache(*args, **kwargs).cache_id  # type: ignore[arg-type]


def addresses(node: Node, cache_id: int) -> list[int]:
    return addrs_of(node.arrays[cache_id])


def push_to_caller(node: Node, seed: int) -> None:
    """Run by the listener: pushes to whoever called it (cluster 2)."""
    cache = node.blocks_cache(*SHAPE, seed=seed)
    node.manager.push_blocks(BlocksCacheKey(2, 0), cache, [1, 2], [7, 0])


class EachLayer(LayerSynchronizer):
    """Lets layers go one by one, and remembers which were asked for."""

    def __init__(self, refused: int = -1, failing: int = -1) -> None:
        self.seen: list[int] = []
        self.allowed = threading.Semaphore(1000)
        self._refused, self._failing = refused, failing

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        self.seen.append(layer_index)
        if layer_index == self._failing:
            raise ValueError("no such layer was computed")
        return self.allowed.acquire(timeout=30) and layer_index != self._refused


def test_push_blocks_moves_exactly_the_named_blocks(pair: Pair) -> None:
    theirs = pair.peer.call(add_blocks, *SHAPE, seed=2, key=BlocksCacheKey(1, 0))
    cache = pair.node.blocks_cache(6, 20, 64, seed=1)
    pair.node.manager.push_blocks(BlocksCacheKey(1, 0), cache, [19, 3, 4], [0, 6, 7])
    expected = make_array(SHAPE, 2)
    expected[:, [0, 6, 7]] = make_array((6, 20, 64), 1)[:, [19, 3, 4]]
    assert np.array_equal(pair.theirs(theirs), expected)


def test_a_listener_pushes_over_a_link_that_its_caller_made(pair: Pair) -> None:
    cache = pair.node.blocks_cache(*SHAPE, key=BlocksCacheKey(2, 0))
    pair.peer.call(push_to_caller, 5)
    got = pair.node.arrays[cache.cache_id][:, [7, 0]]
    assert np.array_equal(got, make_array(SHAPE, 5)[:, [1, 2]])


def test_push_cache_moves_a_row_of_the_chosen_layers(pair: Pair) -> None:
    theirs = pair.peer.call(add_rows, 6, 4, 80, seed=2)
    cache = pair.node.rows_cache(6, 3, 64, seed=1)
    key = CacheKeyByIdAndIndex(1, theirs, 3)
    pair.node.manager.push_cache(key, cache, 2, range(1, 3), range(2), tensor_num_per_layer=2)
    expected = make_array((6, 4, 80), 2)
    expected[:4, 3, :64] = make_array((6, 3, 64), 1)[2:, 2]
    assert np.array_equal(pair.theirs(theirs), expected)


@pytest.mark.parametrize(
    ("theirs", "src_row", "dst_row", "status"),
    [
        ((6, 4, 63), 0, 0, LLMStatusCode.LLM_PARAM_INVALID),  # our row does not fit theirs
        ((4, 4, 64), 0, 0, LLMStatusCode.LLM_PARAM_INVALID),  # they have fewer layers
        ((6, 4, 64), 3, 0, LLMStatusCode.LLM_PARAM_INVALID),
        ((6, 4, 64), 0, 4, LLMStatusCode.LLM_KV_CACHE_NOT_EXIST),
    ],
)
def test_a_push_that_does_not_fit_is_refused_and_writes_nothing(
    pair: Pair, theirs: tuple[int, int, int], src_row: int, dst_row: int, status: LLMStatusCode
) -> None:
    cache_id = pair.peer.call(add_rows, *theirs, seed=2)
    cache = pair.node.rows_cache(6, 3, 64, seed=1)
    with pytest.raises(LLMException) as error:
        pair.node.manager.push_cache(CacheKeyByIdAndIndex(1, cache_id, dst_row), cache, src_row)
    assert error.value.status_code == status
    assert np.array_equal(pair.theirs(cache_id), make_array(theirs, 2))


def test_a_push_of_no_layers_succeeds_and_moves_nothing(pair: Pair) -> None:
    theirs = pair.peer.call(add_blocks, 1, 8, 64, seed=2, key=BlocksCacheKey(1, 0))
    cache = pair.node.blocks_cache(1, 8, 64, seed=1)
    pair.node.manager.push_blocks(BlocksCacheKey(1, 0), cache, [0], [0])
    assert np.array_equal(pair.theirs(theirs), make_array((1, 8, 64), 2))


def test_pushing_needs_remote_access(two_sided: Pair) -> None:
    cache = two_sided.node.blocks_cache(*SHAPE)
    with pytest.raises(LLMException) as error:
        two_sided.node.manager.push_blocks(BlocksCacheKey(1, 0), cache, [0], [0])
    assert error.value.status_code == LLMStatusCode.LLM_PARAM_INVALID


def test_layers_go_out_one_by_one_to_keys(pair: Pair) -> None:
    theirs = pair.peer.call(add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
    cache = pair.node.blocks_cache(*SHAPE, seed=1)
    layers = EachLayer()
    layers.allowed = threading.Semaphore(2)
    configs = [TransferWithCacheKeyConfig(BlocksCacheKey(1, 0), range(1, 3), range(2))]
    task = pair.node.manager.transfer_cache_async(cache, layers, configs, [1, 2], [5, 4])
    assert task.synchronize(20000) == LLMStatusCode.LLM_SUCCESS
    assert task.get_results() == [LLMStatusCode.LLM_SUCCESS]
    assert layers.seen == [1, 2]
    expected = np.zeros(SHAPE, dtype=np.uint8)
    expected[:4, [5, 4]] = make_array(SHAPE, 1)[2:, [1, 2]]
    assert np.array_equal(pair.theirs(theirs), expected)


def test_a_task_that_still_runs_times_out_and_can_be_asked_again(pair: Pair) -> None:
    pair.peer.call(add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
    cache = pair.node.blocks_cache(*SHAPE, seed=1)
    layers = EachLayer()
    layers.allowed = threading.Semaphore(0)
    configs = [TransferWithCacheKeyConfig(BlocksCacheKey(1, 0), range(3), range(3))]
    task = pair.node.manager.transfer_cache_async(cache, layers, configs, [1], [5])
    assert task.synchronize(0) == LLMStatusCode.LLM_TIMEOUT
    assert task.get_results(1) == [LLMStatusCode.LLM_TIMEOUT]
    layers.allowed.release(3)
    assert task.synchronize() == LLMStatusCode.LLM_SUCCESS


def test_an_odd_number_of_tensors_is_sent_whole(pair: Pair) -> None:
    theirs = pair.peer.call(add_rows, 5, 2, 64)
    cache = pair.node.rows_cache(5, 2, 64, seed=1)
    key = CacheKeyByIdAndIndex(1, theirs, 1)
    configs = [TransferWithCacheKeyConfig(key, range(3), range(3), 1)]
    task = pair.node.manager.transfer_cache_async(cache, EachLayer(), configs)
    assert task.synchronize(20000) == LLMStatusCode.LLM_SUCCESS
    assert np.array_equal(pair.theirs(theirs)[:, 1], make_array((5, 2, 64), 1)[:, 1])


def test_a_failing_destination_does_not_stop_the_others(pair: Pair) -> None:
    theirs = pair.peer.call(add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
    cache = pair.node.blocks_cache(*SHAPE, seed=1)
    keys = [BlocksCacheKey(9, 0), BlocksCacheKey(1, 7), BlocksCacheKey(1, 0)]
    configs = [TransferWithCacheKeyConfig(key, range(3), range(3)) for key in keys]
    task = pair.node.manager.transfer_cache_async(cache, EachLayer(), configs, [1], [5])
    assert task.get_results(20000) == [
        LLMStatusCode.LLM_NOT_YET_LINK,
        LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        LLMStatusCode.LLM_SUCCESS,
    ]
    assert task.synchronize() == LLMStatusCode.LLM_NOT_YET_LINK
    assert np.array_equal(pair.theirs(theirs)[:, 5], make_array(SHAPE, 1)[:, 1])


def test_a_refused_layer_ends_the_transfer(pair: Pair) -> None:
    pair.peer.call(add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
    cache = pair.node.blocks_cache(*SHAPE, seed=1)
    key = BlocksCacheKey(1, 0)
    configs = [
        TransferWithCacheKeyConfig(key, range(1), range(1)),
        TransferWithCacheKeyConfig(key, range(1, 2), range(1)),
        TransferWithCacheKeyConfig(key, range(2, 3), range(1)),
    ]
    layers = EachLayer(refused=1)
    task = pair.node.manager.transfer_cache_async(cache, layers, configs, [1], [5])
    assert task.get_results(20000) == [
        LLMStatusCode.LLM_SUCCESS,
        LLMStatusCode.LLM_PARAM_INVALID,
        None,
    ]
    assert task.synchronize() == LLMStatusCode.LLM_PARAM_INVALID
    assert layers.seen == [0, 1]


def test_an_exception_in_the_synchronizer_is_never_success(pair: Pair) -> None:
    pair.peer.call(add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
    cache = pair.node.blocks_cache(*SHAPE, seed=1)
    configs = [TransferWithCacheKeyConfig(BlocksCacheKey(1, 0), range(3), range(3))]
    task = pair.node.manager.transfer_cache_async(cache, EachLayer(failing=2), configs, [1], [5])
    assert task.synchronize(20000) == LLMStatusCode.LLM_FAILED
    assert task.get_results() == [LLMStatusCode.LLM_FAILED]


def test_layers_go_to_addresses_in_two_sided_mode(two_sided: Pair) -> None:
    theirs = two_sided.peer.call(add_blocks, *SHAPE, seed=2)
    addrs = two_sided.peer.call(addresses, theirs)
    cache = two_sided.node.blocks_cache(*SHAPE, seed=1)
    configs = [TransferConfig(1, addrs[2:6], range(1, 3))]
    task = two_sided.node.manager.transfer_cache_async(cache, EachLayer(), configs, [1, 2], [3, 0])
    assert task.synchronize(20000) == LLMStatusCode.LLM_SUCCESS
    expected = make_array(SHAPE, 2)
    expected[2:6, [3, 0]] = make_array(SHAPE, 1)[2:6, [1, 2]]
    assert np.array_equal(two_sided.theirs(theirs), expected)


def test_a_row_is_cut_into_blocks_at_addresses(two_sided: Pair) -> None:
    theirs = two_sided.peer.call(add_blocks, 2, 8, 16, seed=2)
    addrs = two_sided.peer.call(addresses, theirs)
    cache = two_sided.node.rows_cache(2, 3, 40, seed=1)
    task = two_sided.node.manager.transfer_cache_async(
        cache, EachLayer(), [TransferConfig(1, addrs, src_batch_index=1)], None, [7, 0, 3], 16
    )
    assert task.synchronize(20000) == LLMStatusCode.LLM_SUCCESS
    row = make_array((2, 3, 40), 1)[:, 1]
    expected = make_array((2, 8, 16), 2)
    expected[:, 7], expected[:, 0], expected[:, 3, :8] = row[:, :16], row[:, 16:32], row[:, 32:]
    assert np.array_equal(two_sided.theirs(theirs), expected)


def test_addresses_outside_of_registered_memory_are_refused(two_sided: Pair) -> None:
    theirs = two_sided.peer.call(add_blocks, 2, 8, 64, seed=2)
    addrs = two_sided.peer.call(addresses, theirs)
    cache = two_sided.node.blocks_cache(2, 8, 64, seed=1)
    outside = [addrs[0], addrs[1] + 64]
    task = two_sided.node.manager.transfer_cache_async(
        cache, EachLayer(), [TransferConfig(1, outside)], [0], [7]
    )
    assert task.synchronize(20000) == LLMStatusCode.LLM_PARAM_INVALID
    assert np.array_equal(two_sided.theirs(theirs), make_array((2, 8, 64), 2))
