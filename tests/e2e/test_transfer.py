"""Layer-wise transfers between two processes: the bytes, the order, the results. Spec 6.12."""

from __future__ import annotations

import threading

import linked_pair
import numpy as np
import pytest
from linked_pair import GONE, INVALID, NOT_LINKED, SUCCESS, Pair, add_blocks, add_rows

from llm_datadist import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.testing.cluster import Node, addrs_of, make_array
from llm_datadist.testing.timing import eventually

SHAPE = (6, 8, 64)

pusher = linked_pair.pusher
two_sided = linked_pair.two_sided


def addresses(node: Node, cache_id: int) -> list[int]:
    return addrs_of(node.arrays[cache_id])


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


@pytest.mark.shows("cm.transfer_cache_async", "cm.transfer.synchronizer", "O6")
def test_layers_go_out_one_by_one_to_keys(pusher: Pair) -> None:
    theirs = pusher.peer.call(add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
    cache = pusher.node.blocks_cache(*SHAPE, seed=1)
    layers = EachLayer()
    layers.allowed = threading.Semaphore(2)
    configs = [TransferWithCacheKeyConfig(BlocksCacheKey(1, 0), range(1, 3), range(2))]
    task = pusher.node.manager.transfer_cache_async(cache, layers, configs, [1, 2], [5, 4])
    assert task.synchronize(20000) == SUCCESS
    assert task.get_results() == [SUCCESS]
    assert layers.seen == [1, 2]
    expected = np.zeros(SHAPE, dtype=np.uint8)
    expected[:4, [5, 4]] = make_array(SHAPE, 1)[2:, [1, 2]]
    assert np.array_equal(pusher.theirs(theirs), expected)


@pytest.mark.shows("cm.transfer.results")
def test_a_task_that_still_runs_times_out_and_can_be_asked_again(pusher: Pair) -> None:
    pusher.peer.call(add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
    cache = pusher.node.blocks_cache(*SHAPE, seed=1)
    layers = EachLayer()
    layers.allowed = threading.Semaphore(0)
    configs = [TransferWithCacheKeyConfig(BlocksCacheKey(1, 0), range(3), range(3))]
    task = pusher.node.manager.transfer_cache_async(cache, layers, configs, [1], [5])
    assert task.synchronize(0) == LLMStatusCode.LLM_TIMEOUT
    assert task.get_results(1) == [LLMStatusCode.LLM_TIMEOUT]
    layers.allowed.release(3)
    assert task.synchronize() == SUCCESS


@pytest.mark.shows("cm.transfer_cache_async", "cm.transfer.odd")
def test_an_odd_number_of_tensors_is_sent_whole(pusher: Pair) -> None:
    theirs = pusher.peer.call(add_rows, 5, 2, 64)
    cache = pusher.node.rows_cache(5, 2, 64, seed=1)
    key = CacheKeyByIdAndIndex(1, theirs, 1)
    configs = [TransferWithCacheKeyConfig(key, range(3), range(3), 1)]
    task = pusher.node.manager.transfer_cache_async(cache, EachLayer(), configs)
    assert task.synchronize(20000) == SUCCESS
    assert np.array_equal(pusher.theirs(theirs)[:, 1], make_array((5, 2, 64), 1)[:, 1])


@pytest.mark.shows(
    "error.46", "error.47", "error.58", "cm.transfer.results", "cm.transfer.others_go_on"
)
def test_a_failing_destination_does_not_stop_the_others(pusher: Pair) -> None:
    theirs = pusher.peer.call(add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
    cache = pusher.node.blocks_cache(*SHAPE, seed=1)
    keys = [BlocksCacheKey(9, 0), BlocksCacheKey(1, 7), BlocksCacheKey(1, 0)]
    configs = [TransferWithCacheKeyConfig(key, range(3), range(3)) for key in keys]
    task = pusher.node.manager.transfer_cache_async(cache, EachLayer(), configs, [1], [5])
    assert task.get_results(20000) == [
        NOT_LINKED,
        GONE,
        SUCCESS,
    ]
    assert task.synchronize() == NOT_LINKED
    assert np.array_equal(pusher.theirs(theirs)[:, 5], make_array(SHAPE, 1)[:, 1])


@pytest.mark.shows("O8", "D27", "cm.transfer.synchronizer", "cm.transfer.results")
def test_a_refused_layer_ends_the_transfer(pusher: Pair) -> None:
    pusher.peer.call(add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
    cache = pusher.node.blocks_cache(*SHAPE, seed=1)
    key = BlocksCacheKey(1, 0)
    configs = [
        TransferWithCacheKeyConfig(key, range(1), range(1)),
        TransferWithCacheKeyConfig(key, range(1, 2), range(1)),
        TransferWithCacheKeyConfig(key, range(2, 3), range(1)),
    ]
    layers = EachLayer(refused=1)
    task = pusher.node.manager.transfer_cache_async(cache, layers, configs, [1], [5])
    assert task.get_results(20000) == [
        SUCCESS,
        INVALID,
        None,
    ]
    assert task.synchronize() == INVALID
    assert layers.seen == [0, 1]


@pytest.mark.shows("O7", "error.58")
def test_an_exception_in_the_synchronizer_is_never_success(pusher: Pair) -> None:
    pusher.peer.call(add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
    cache = pusher.node.blocks_cache(*SHAPE, seed=1)
    configs = [TransferWithCacheKeyConfig(BlocksCacheKey(1, 0), range(3), range(3))]
    task = pusher.node.manager.transfer_cache_async(cache, EachLayer(failing=2), configs, [1], [5])
    assert task.synchronize(20000) == LLMStatusCode.LLM_FAILED
    assert task.get_results() == [LLMStatusCode.LLM_FAILED]


@pytest.mark.shows("cm.transfer_cache_async")
def test_layers_go_to_addresses_in_two_sided_mode(two_sided: Pair) -> None:
    theirs = two_sided.peer.call(add_blocks, *SHAPE, seed=2)
    addrs = two_sided.peer.call(addresses, theirs)
    cache = two_sided.node.blocks_cache(*SHAPE, seed=1)
    configs = [TransferConfig(1, addrs[2:6], range(1, 3))]
    task = two_sided.node.manager.transfer_cache_async(cache, EachLayer(), configs, [1, 2], [3, 0])
    assert task.synchronize(20000) == SUCCESS
    expected = make_array(SHAPE, 2)
    expected[2:6, [3, 0]] = make_array(SHAPE, 1)[2:6, [1, 2]]
    assert np.array_equal(two_sided.theirs(theirs), expected)


@pytest.mark.shows("cm.transfer_cache_async", "O11")
def test_a_row_is_cut_into_blocks_at_addresses(two_sided: Pair) -> None:
    theirs = two_sided.peer.call(add_blocks, 2, 8, 16, seed=2)
    addrs = two_sided.peer.call(addresses, theirs)
    cache = two_sided.node.rows_cache(2, 3, 40, seed=1)
    task = two_sided.node.manager.transfer_cache_async(
        cache, EachLayer(), [TransferConfig(1, addrs, src_batch_index=1)], None, [7, 0, 3], 16
    )
    assert task.synchronize(20000) == SUCCESS
    row = make_array((2, 3, 40), 1)[:, 1]
    expected = make_array((2, 8, 16), 2)
    expected[:, 7], expected[:, 0], expected[:, 3, :8] = row[:, :16], row[:, 16:32], row[:, 32:]
    assert np.array_equal(two_sided.theirs(theirs), expected)


@pytest.mark.shows("error.58")
def test_addresses_outside_of_registered_memory_are_refused(two_sided: Pair) -> None:
    theirs = two_sided.peer.call(add_blocks, 2, 8, 64, seed=2)
    addrs = two_sided.peer.call(addresses, theirs)
    cache = two_sided.node.blocks_cache(2, 8, 64, seed=1)
    outside = [addrs[0], addrs[1] + 64]
    task = two_sided.node.manager.transfer_cache_async(
        cache, EachLayer(), [TransferConfig(1, outside)], [0], [7]
    )
    assert task.synchronize(20000) == INVALID
    assert np.array_equal(two_sided.theirs(theirs), make_array((2, 8, 64), 2))


@pytest.mark.shows("cm.transfer.overlap")
def test_a_layer_arrives_while_the_next_one_is_computed(pusher: Pair) -> None:
    theirs = pusher.peer.call(add_rows, *SHAPE)
    cache = pusher.node.rows_cache(*SHAPE)
    ours, source = pusher.node.arrays[cache.cache_id], make_array(SHAPE, 1)
    layers = EachLayer()
    layers.allowed = threading.Semaphore(0)
    configs = [TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(1, theirs), range(3), range(3))]
    task = pusher.node.manager.transfer_cache_async(cache, layers, configs)
    for layer in range(3):
        tensors = slice(2 * layer, 2 * layer + 2)
        ours[tensors, 0] = source[tensors, 0]  # computed only now
        assert task.synchronize(0) == LLMStatusCode.LLM_TIMEOUT
        layers.allowed.release()
        assert eventually(
            lambda there=tensors: np.array_equal(pusher.theirs(theirs)[there], ours[there])  # type: ignore[misc]
        )
        assert not pusher.theirs(theirs)[tensors.stop :].any()
    assert task.synchronize(20000) == SUCCESS


@pytest.mark.shows("cm.transfer.synchronizer", "O8", "cm.transfer.results")
def test_each_layer_is_asked_for_once_if_somebody_wants_it(pusher: Pair) -> None:
    """Five layers; nobody wants the first and the fourth, two want the third."""
    theirs = pusher.peer.call(add_rows, 10, 3, 64)
    cache = pusher.node.rows_cache(10, 2, 64, seed=1)
    keys = [CacheKeyByIdAndIndex(1, theirs, row) for row in range(3)]
    configs = [
        TransferWithCacheKeyConfig(keys[0], range(2, 3), range(4, 5)),
        TransferWithCacheKeyConfig(keys[1], range(4, 5), range(1), 1),
        TransferWithCacheKeyConfig(keys[2], range(1, 3), range(1, 3)),
    ]
    layers = EachLayer()
    task = pusher.node.manager.transfer_cache_async(cache, layers, configs)
    assert task.get_results(20000) == [SUCCESS] * 3
    assert layers.seen == [1, 2, 4]
    source = make_array((10, 2, 64), 1)
    expected = np.zeros((10, 3, 64), dtype=np.uint8)
    expected[8:, 0], expected[:2, 1], expected[2:6, 2] = (
        source[4:6, 0],
        source[8:, 1],
        source[2:6, 0],
    )
    assert np.array_equal(pusher.theirs(theirs), expected)


@pytest.mark.shows("cm.transfer_cache_async", "cm.transfer.synchronizer", "cm.transfer.results")
def test_a_transfer_to_nobody_succeeds(pusher: Pair) -> None:
    layers = EachLayer()
    task = pusher.node.manager.transfer_cache_async(pusher.node.rows_cache(), layers, [])
    assert task.synchronize(20000) == SUCCESS
    assert (task.get_results(), layers.seen) == ([], [])


@pytest.mark.shows("cm.transfer_cache_async", "O11")
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4])
def test_a_row_is_cut_into_the_blocks_that_a_key_names(pusher: Pair, num_blocks: int) -> None:
    """A row of 40 bytes has two chunks of 16 and one of 8."""
    theirs = pusher.peer.call(add_blocks, 4, 8, 16, seed=2, key=BlocksCacheKey(1, 0))
    cache = pusher.node.rows_cache(4, 3, 40, seed=1)
    configs = [TransferWithCacheKeyConfig(BlocksCacheKey(1, 0), range(2), range(2))]
    blocks = [7, 0, 3, 4][:num_blocks]
    task = pusher.node.manager.transfer_cache_async(cache, EachLayer(), configs, None, blocks, 16)
    expected = make_array((4, 8, 16), 2)
    if num_blocks == 4:
        assert task.synchronize(20000) == INVALID
    else:
        assert task.synchronize(20000) == SUCCESS
        for chunk, block in enumerate(blocks):
            part = make_array((4, 3, 40), 1)[:, 0, 16 * chunk : 16 * chunk + 16]
            expected[:, block, : part.shape[1]] = part
    assert np.array_equal(pusher.theirs(theirs), expected)


@pytest.mark.shows("cm.transfer_cache_async")
def test_a_row_goes_to_addresses(two_sided: Pair) -> None:
    """To row 1: whoever names addresses adds the offset."""
    theirs = two_sided.peer.call(add_rows, *SHAPE, seed=2)
    addrs = [addr + 64 for addr in two_sided.peer.call(addresses, theirs)]
    cache = two_sided.node.rows_cache(*SHAPE, seed=1)
    config = TransferConfig(1, addrs, src_batch_index=3)
    task = two_sided.node.manager.transfer_cache_async(cache, EachLayer(), [config])
    assert task.synchronize(20000) == SUCCESS
    assert config.src_layer_range == range(3)
    expected = make_array(SHAPE, 2)
    expected[:, 1] = make_array(SHAPE, 1)[:, 3]
    assert np.array_equal(two_sided.theirs(theirs), expected)


@pytest.mark.shows("cm.transfer_cache_async")
def test_blocks_go_to_blocks_of_the_size_that_is_said(pusher: Pair) -> None:
    theirs = pusher.peer.call(add_blocks, *SHAPE, seed=2, key=BlocksCacheKey(1, 0))
    cache = pusher.node.blocks_cache(*SHAPE, seed=1)
    configs = [TransferWithCacheKeyConfig(BlocksCacheKey(1, 0), range(3), range(3))]
    transfer = pusher.node.manager.transfer_cache_async
    task = transfer(cache, EachLayer(), configs, [1], [5], 32)
    assert task.get_results(20000) == [INVALID]
    assert np.array_equal(pusher.theirs(theirs), make_array(SHAPE, 2))
    task = transfer(cache, EachLayer(), configs, [1], [5], 64)
    assert task.get_results(20000) == [SUCCESS]
    assert np.array_equal(pusher.theirs(theirs)[:, 5], make_array(SHAPE, 1)[:, 1])


@pytest.mark.shows("error.58", "error.48", "error.50", "O15")
@pytest.mark.parametrize(
    ("key", "status"),
    [
        (CacheKeyByIdAndIndex(1, 1), SUCCESS),
        (CacheKeyByIdAndIndex(1, 2), SUCCESS),  # blocks: into the first one
        (CacheKeyByIdAndIndex(1, 2, 1), GONE),  # which is its only row
        (CacheKeyByIdAndIndex(1, 3), INVALID),  # not accessible
        (CacheKeyByIdAndIndex(1, 4), INVALID),  # shorter rows
        (CacheKeyByIdAndIndex(1, 5), INVALID),  # fewer layers
        (CacheKeyByIdAndIndex(1, 0), GONE),
        (CacheKeyByIdAndIndex(1, -1), GONE),
        (CacheKeyByIdAndIndex(1, 9), GONE),
        (CacheKeyByIdAndIndex(9, 1), NOT_LINKED),
    ],
    ids=str,
)
def test_what_fails_on_the_way_is_a_result(
    pusher: Pair, key: CacheKeyByIdAndIndex, status: LLMStatusCode
) -> None:
    pusher.peer.call(add_rows, *SHAPE)
    pusher.peer.call(add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
    pusher.peer.call(add_rows, *SHAPE, remote_accessible=False)
    pusher.peer.call(add_rows, 6, 8, 63)
    pusher.peer.call(add_rows, 4, 8, 64)
    cache = pusher.node.rows_cache(*SHAPE, seed=1)
    configs = [TransferWithCacheKeyConfig(key, range(3), range(3))]
    task = pusher.node.manager.transfer_cache_async(cache, EachLayer(), configs)
    assert (task.get_results(20000), task.synchronize()) == ([status], status)


@pytest.mark.shows("D27", "cm.transfer.results")
def test_a_config_that_was_never_reached_has_no_result(pusher: Pair) -> None:
    theirs = pusher.peer.call(add_rows, *SHAPE)
    cache = pusher.node.rows_cache(*SHAPE, seed=1)
    key = CacheKeyByIdAndIndex(1, theirs)
    configs = [
        TransferWithCacheKeyConfig(key, range(1, 2), range(1, 2)),
        TransferWithCacheKeyConfig(key, range(2, 3), range(2, 3)),
    ]
    task = pusher.node.manager.transfer_cache_async(cache, EachLayer(refused=1), configs)
    assert task.get_results(20000) == [INVALID, None]
    assert task.synchronize() == INVALID
    assert not pusher.theirs(theirs).any()
