"""The v1 mode: a prompt in another process and a decoder here, or the other way round."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import v1_cluster
from v1_cluster import (
    DECODER,
    INVALID,
    NOT_EXIST,
    PROMPT,
    Gate,
    Pair,
    add_blocks,
    add_rows,
    addresses,
    assert_refused,
    deallocate_kept,
    make_blocks,
    make_pair,
    make_rows,
    manager_of,
    read,
    read_kept,
    remove_key,
    start,
)

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMStatusCode,
    TransferConfig,
)
from llm_datadist.testing.cluster import Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Callable

alone = v1_cluster.alone
decoder = v1_cluster.decoder
prompt = v1_cluster.prompt
NO_ID = 2**64 - 1


# -- pulling --


@pytest.mark.shows("v1.allocate_cache", "v1.pull_cache", "v1.remove_cache_key")
def test_a_decoder_pulls_each_row_by_its_key_once(decoder: Pair) -> None:
    keys = [CacheKey(1, 10), CacheKey(1, NO_ID), CacheKey(1, 12)]
    decoder.peer.call(add_rows, 4, 3, 64, seed=1, keys=keys)
    target = make_rows(decoder.node, 4, 2, 64, seed=2)
    decoder.manager.pull_cache(keys[2], target, 1)
    expected = make_array((4, 2, 64), 2)
    expected[:, 1] = make_array((4, 3, 64), 1)[:, 2]
    assert np.array_equal(read(decoder.node, target), expected)
    assert_refused(NOT_EXIST, "req_id=12", decoder.manager.pull_cache, keys[2], target)
    decoder.peer.call(remove_key, keys[0])
    assert_refused(NOT_EXIST, "req_id=10", decoder.manager.pull_cache, keys[0], target)


def named_offsets(src: object, dst: object) -> dict[str, Any]:
    return {"src_cache_offset": src, "dst_cache_offset": dst}


@pytest.mark.shows("v1.pull_cache")
@pytest.mark.parametrize(
    ("size", "src", "dst", "moved"),
    [
        (-1, None, None, 64),
        (-1, 0, 0, 64),
        (-1, 36, None, 64),
        (-1, None, 40, 24),
        (-1, 99, 63, 1),
        (17, 3, 5, 17),
        (60, 40, 4, 60),
    ],
)
def test_offsets_say_where_in_the_rows_a_pull_begins(
    decoder: Pair, size: int, src: int | None, dst: int | None, moved: int
) -> None:
    theirs = decoder.peer.call(add_rows, 4, 3, 100, seed=1)
    target = make_rows(decoder.node, 2, 2, 64, seed=2)
    given = {name: offset for name, offset in named_offsets(src, dst).items() if offset is not None}
    decoder.manager.pull_cache(
        CacheKeyByIdAndIndex(1, theirs, 2),
        target,
        1,
        size,
        src_layer_range=range(1, 2),
        **given,
    )
    src, dst = src or 0, dst or 0
    expected = make_array((2, 2, 64), 2)
    expected[:, 1, dst : dst + moved] = make_array((4, 3, 100), 1)[2:, 2, src : src + moved]
    assert np.array_equal(read(decoder.node, target), expected)


@pytest.mark.shows("v1.pull_cache")
@pytest.mark.parametrize(
    ("size", "src", "dst", "says"),
    [
        (-1, 37, 0, "source's rows have behind offset 37, 63"),
        (-1, 100, 60, "offset 100 lies behind the source's rows of 100 bytes"),
        (-1, 0, 64, "offset 64 lies behind the destination's rows of 64 bytes"),
        (1, 2**63 - 1, 0, "lies behind the source's rows"),
        (1, 0, 2**63 - 1, "lies behind the destination's rows"),
        (2, 99, 0, "source's rows have behind offset 99, 1"),
        (2, 0, 63, "destination's rows have behind offset 63, 1"),
    ],
)
def test_offsets_beyond_the_rows_are_refused_and_nothing_is_written(
    decoder: Pair, size: int, src: int, dst: int, says: str
) -> None:
    theirs = decoder.peer.call(add_rows, 2, 3, 100, seed=1)
    target = make_rows(decoder.node, 2, 2, 64, seed=2)
    pull = decoder.manager.pull_cache
    key = CacheKeyByIdAndIndex(1, theirs)
    assert_refused(INVALID, says, pull, key, target, 0, size, **named_offsets(src, dst))
    assert np.array_equal(read(decoder.node, target), make_array((2, 2, 64), 2))


@pytest.mark.shows("v1.pull_cache")
@pytest.mark.parametrize(
    ("offset", "error"),
    [(-1, ValueError), (2**63, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)],
)
def test_an_offset_is_a_number_of_bytes(node: Node, offset: object, error: type[Exception]) -> None:
    start(node, DECODER, 1)
    cache = make_rows(node, 2, 2, 64)
    with pytest.raises(error, match="src_cache_offset"):
        manager_of(node).pull_cache(CacheKey(1, 1), cache, src_cache_offset=offset)
    with pytest.raises(error, match="dst_cache_offset"):
        manager_of(node).pull_cache(CacheKey(1, 1), cache, dst_cache_offset=offset)


@pytest.mark.shows("v1.deallocate_cache")
def test_a_deallocated_cache_does_not_exist(decoder: Pair) -> None:
    theirs = decoder.peer.call(add_rows, 2, 1, 64, seed=1)
    key, target = CacheKeyByIdAndIndex(1, theirs), make_rows(decoder.node, 2, 1, 64)
    decoder.manager.pull_cache(key, target)
    decoder.manager.deallocate_cache(target)
    assert_refused(NOT_EXIST, None, decoder.manager.pull_cache, key, target)
    decoder.peer.call(deallocate_kept, theirs)
    target = make_rows(decoder.node, 2, 1, 64)
    assert_refused(NOT_EXIST, None, decoder.manager.pull_cache, key, target)


@pytest.mark.shows("v1.allocate_blocks_cache", "v1.pull_blocks")
def test_pull_blocks_moves_exactly_the_named_blocks(decoder: Pair) -> None:
    decoder.peer.call(add_blocks, 4, 16, 100, seed=1, key=BlocksCacheKey(1, 3))
    target = make_blocks(decoder.node, 4, 10, 100, seed=2)
    src, dst = [3, 0, 15, 7, 8, 9], [9, 1, 0, 4, 5, 6]
    expected = make_array((4, 10, 100), 2)
    expected[2:, dst] = make_array((4, 16, 100), 1)[:2, src]
    decoder.manager.pull_blocks(
        BlocksCacheKey(1, 3),
        target,
        src,
        dst,
        src_layer_range=range(1),
        dst_layer_range=range(1, 2),
    )
    assert np.array_equal(read(decoder.node, target), expected)


@pytest.mark.shows("v1.pull_blocks")
@pytest.mark.parametrize(
    ("src", "dst"), [([], [0]), ([0], []), ([0, 1], [0]), ([0], [0, 1]), ([4], [0]), ([0], [4])]
)
def test_pull_blocks_needs_pairs_of_blocks(decoder: Pair, src: list[int], dst: list[int]) -> None:
    key = BlocksCacheKey(1, 3)
    decoder.peer.call(add_blocks, 2, 4, 64, seed=1, key=key)
    target = make_blocks(decoder.node, 2, 4, 64, seed=2)
    assert_refused(INVALID, None, decoder.manager.pull_blocks, key, target, src, dst)
    assert np.array_equal(read(decoder.node, target), make_array((2, 4, 64), 2))


@pytest.mark.shows("v1.pull_blocks")
def test_pull_blocks_is_for_blocks_alone(decoder: Pair) -> None:
    target = make_blocks(decoder.node, 2, 4, 64)
    for key in (CacheKey(1, 1), CacheKeyByIdAndIndex(1, 1)):
        with pytest.raises(TypeError, match="prompt_cache_key"):
            decoder.manager.pull_blocks(key, target, [0], [0])  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="prompt_cache_key"):
        decoder.manager.pull_blocks(None, target, [0], [0])  # type: ignore[arg-type]


@pytest.mark.shows("v1.reinit", "v1.pull_cache")
def test_a_pair_that_was_finalized_links_and_pulls_again(
    node: Node, peer: NodeProcess, path: str
) -> None:
    for seed in (1, 2):
        decoder = make_pair(node, peer, path, PROMPT, DECODER)
        theirs = peer.call(add_rows, 2, 1, 64, seed=seed)
        target = make_rows(node, 2, 1, 64)
        decoder.manager.pull_cache(CacheKeyByIdAndIndex(1, theirs), target)
        assert np.array_equal(read(node, target), make_array((2, 1, 64), seed))
        peer.call(Node.stop)
        node.stop()


# -- layer by layer --


@pytest.mark.shows("v1.transfer_cache_async")
def test_layers_go_to_the_addresses_of_a_decoder(prompt: Pair) -> None:
    theirs = prompt.peer.call(add_blocks, 6, 8, 64, seed=2)
    addrs = prompt.peer.call(addresses, theirs)
    cache = make_blocks(prompt.node, 6, 8, 64, seed=1)
    configs = [TransferConfig(1, addrs[2:6], range(1, 3))]
    task = prompt.manager.transfer_cache_async(cache, Gate().open(), configs, [1, 2], [3, 0])
    assert task.synchronize(20000) == LLMStatusCode.LLM_SUCCESS
    expected = make_array((6, 8, 64), 2)
    expected[2:6, [3, 0]] = make_array((6, 8, 64), 1)[2:6, [1, 2]]
    assert np.array_equal(prompt.peer.call(read_kept, theirs), expected)


@pytest.mark.shows("v1.transfer_rows_as_blocks")
@pytest.mark.parametrize("block_nbytes", [None, 0, 64])
@pytest.mark.parametrize("add", [add_rows, add_blocks])
def test_rows_of_an_allocated_cache_go_as_blocks(
    prompt: Pair, add: Callable[..., int], block_nbytes: int | None
) -> None:
    theirs = prompt.peer.call(add, 4, 8, 64, seed=2)
    addrs = prompt.peer.call(addresses, theirs)
    cache = make_rows(prompt.node, 4, 6, 64, seed=1)
    asked = cache, Gate().open(), [TransferConfig(1, addrs)], [1, 2, 5], [3, 0, 7], block_nbytes
    status = prompt.manager.transfer_cache_async(*asked).synchronize(20000)
    assert status == LLMStatusCode.LLM_SUCCESS
    expected = make_array((4, 8, 64), 2)
    expected[:, [3, 0, 7]] = make_array((4, 6, 64), 1)[:, [1, 2, 5]]
    assert np.array_equal(prompt.peer.call(read_kept, theirs), expected)


@pytest.mark.shows("v1.transfer_rows_as_blocks")
@pytest.mark.parametrize(
    ("src_blocks", "dst_blocks", "block_nbytes"),
    [([6], [0], None), ([0], [8], None), ([0], [0], 63)],
    ids=["no such row", "beyond the peer's cache", "another size"],
)
def test_rows_that_do_not_go_as_blocks_are_refused(
    prompt: Pair, src_blocks: list[int], dst_blocks: list[int], block_nbytes: int | None
) -> None:
    theirs = prompt.peer.call(add_blocks, 4, 8, 64, seed=2)
    addrs = prompt.peer.call(addresses, theirs)
    cache = make_rows(prompt.node, 4, 6, 64, seed=1)
    asked = cache, Gate().open(), [TransferConfig(1, addrs)], src_blocks, dst_blocks, block_nbytes
    assert prompt.manager.transfer_cache_async(*asked).synchronize(20000) == INVALID
    assert np.array_equal(prompt.peer.call(read_kept, theirs), make_array((4, 8, 64), 2))


@pytest.mark.shows("v1.transfer_rows_as_blocks")
def test_a_cache_of_rows_is_none_of_blocks_in_other_calls(prompt: Pair) -> None:
    cache, manager = make_rows(prompt.node, 4, 6, 64), prompt.manager
    assert_refused(INVALID, "use copy_cache", manager.copy_blocks, cache, {0: [1]})
    assert not cache._cache.is_blocks_cache


@pytest.mark.shows("v1.transfer_cache_async")
def test_a_transfer_that_still_runs_has_the_code_of_this_mode(prompt: Pair) -> None:
    theirs = prompt.peer.call(add_rows, 2, 1, 64)
    addrs = prompt.peer.call(addresses, theirs)
    cache = make_rows(prompt.node, 2, 1, 64, seed=1)
    gate = Gate()
    configs = [TransferConfig(1, addrs), TransferConfig(1, addrs)]
    task = prompt.manager.transfer_cache_async(cache, gate, configs)
    assert task.synchronize(0) == LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
    assert task.get_results(0) == [LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT] * 2
    gate.open()
    assert task.get_results() == [LLMStatusCode.LLM_SUCCESS] * 2
    assert np.array_equal(prompt.peer.call(read_kept, theirs), make_array((2, 1, 64), 1))


def test_a_transfer_holds_its_cache(prompt: Pair) -> None:
    theirs = prompt.peer.call(add_rows, 4, 1, 64)
    configs = [TransferConfig(1, prompt.peer.call(addresses, theirs))]
    gate = Gate()
    task = prompt.manager.transfer_cache_async(
        make_rows(prompt.node, 4, 1, 64, seed=1), gate, configs
    )
    gc.collect()
    make_rows(prompt.node, 4, 1, 64, seed=3)
    gate.open()
    assert task.synchronize(20000) == LLMStatusCode.LLM_SUCCESS
    assert np.array_equal(prompt.peer.call(read_kept, theirs), make_array((4, 1, 64), 1))


@pytest.mark.shows("v1.transfer_cache_async")
def test_a_refused_layer_leaves_later_ones_without_a_result(prompt: Pair) -> None:
    addrs = prompt.peer.call(addresses, prompt.peer.call(add_rows, 6, 1, 64))
    cache = make_rows(prompt.node, 6, 1, 64)
    configs = [TransferConfig(1, addrs[:2], range(i, i + 1)) for i in range(3)]
    task = prompt.manager.transfer_cache_async(cache, Gate(refused=1).open(), configs)
    assert task.synchronize(20000) == INVALID
    assert task.get_results() == [LLMStatusCode.LLM_SUCCESS, INVALID, None]


@pytest.mark.shows("v1.transfer_cache_async")
def test_arguments_of_a_transfer_that_cannot_be_are_refused_at_once(alone: Node) -> None:
    transfer, gate = manager_of(alone).transfer_cache_async, Gate().open()
    rows, configs = make_rows(alone, 2, 1, 64), [TransferConfig(1, [1, 2])]
    assert_refused(INVALID, "dst_block_memory_size", transfer, rows, gate, configs, [], [], 1)
    with pytest.raises(ValueError, match="dst_block_indices"):
        transfer(rows, gate, configs, None, [-1], 16)
    with pytest.raises(ValueError, match="src_block_indices"):
        transfer(make_blocks(alone, 2, 4, 16), gate, configs, [-1], [0])
