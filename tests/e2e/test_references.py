"""What holds an allocated cache: its id, its keys, and what pulls use up. Spec 6.6, 6.7."""

from __future__ import annotations

from contextlib import suppress

import cache_owner
import numpy as np
import pytest
from cache_owner import (
    GONE,
    INVALID,
    PLACEHOLDER,
    SHAPE,
    SUCCESS,
    Pair,
    allocate,
    allocate_and_deallocate,
    allocate_blocks,
    by_id,
    deallocate,
    desc_of,
    is_all_free,
    key,
    prefix,
    remove_key,
    row,
    status_of,
)

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMException,
)
from llm_datadist.testing.cluster import Node, make_array

accessible = cache_owner.accessible
either = cache_owner.either
pair = cache_owner.pair


@pytest.mark.shows("keys.references", "keys.consumed", "cm.allocate_cache", "cm.deallocate_cache")
def test_the_walk_through_of_the_specification(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate, [key(0), PLACEHOLDER, key(2)], 7)
    assert np.array_equal(pair.pull(key(0)), row(7, 0))
    assert pair.refused(key(0)) is GONE
    pair.owner.call(deallocate, cache_id)
    assert not pair.owner.call(is_all_free)
    assert np.array_equal(pair.pull(by_id(cache_id, 2)), row(7, 2))
    assert pair.owner.call(is_all_free)
    assert pair.refused(key(2)) is GONE
    for index in range(3):
        assert pair.refused(by_id(cache_id, index)) is GONE


@pytest.mark.shows("relies.18", "keys.references")
def test_deallocated_at_once_the_key_keeps_the_memory_until_it_is_pulled(pair: Pair) -> None:
    for seed in range(1, 4):
        pair.owner.call(allocate_and_deallocate, [key(1)], seed)
        assert not pair.owner.call(is_all_free)
        assert np.array_equal(pair.pull(key(1)), row(seed, 0))
        assert pair.owner.call(is_all_free)


@pytest.mark.shows("keys.consumed", "cm.deallocate_cache")
def test_a_deallocated_cache_that_a_key_holds_can_still_be_pulled_by_id(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate_and_deallocate, [PLACEHOLDER, key(1)], 5)
    assert np.array_equal(pair.pull(by_id(cache_id, 0)), row(5, 0))
    assert np.array_equal(pair.pull(by_id(cache_id, 2)), row(5, 2))
    assert not pair.owner.call(is_all_free)
    assert np.array_equal(pair.pull(by_id(cache_id, 1)), row(5, 1))
    assert pair.owner.call(is_all_free)


@pytest.mark.shows("keys.references")
def test_while_the_id_holds_it_a_cache_without_keys_stays(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate, [key(1)], 5)
    assert np.array_equal(pair.pull(key(1)), row(5, 0))
    assert np.array_equal(pair.pull(by_id(cache_id, 0)), row(5, 0))
    assert not pair.owner.call(is_all_free)
    pair.owner.call(deallocate, cache_id)
    assert pair.owner.call(is_all_free)


@pytest.mark.shows("cm.remove_cache_key", "keys.references")
def test_the_last_key_removed_frees_a_deallocated_cache(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate, [key(1), prefix(2)], 5)
    pair.owner.call(remove_key, key(1))
    assert pair.refused(key(1)) is GONE
    assert np.array_equal(pair.pull(by_id(cache_id, 0)), row(5, 0))
    pair.owner.call(deallocate, cache_id)
    pair.owner.call(remove_key, key(1))
    assert not pair.owner.call(is_all_free)
    pair.owner.call(remove_key, prefix(2))
    assert pair.owner.call(is_all_free)
    assert pair.refused(prefix(2)) is GONE
    assert pair.refused(by_id(cache_id, 0)) is GONE


@pytest.mark.shows("keys.prefix", "cm.remove_cache_key")
def test_a_prefix_is_never_used_up(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate_and_deallocate, [prefix(1), prefix(1, 5)], 5)
    for _ in range(2):
        assert np.array_equal(pair.pull(prefix(1)), row(5, 0))
        assert np.array_equal(pair.pull(by_id(cache_id, 0)), row(5, 0))
        assert np.array_equal(pair.pull(prefix(1, 5)), row(5, 1))
        assert np.array_equal(pair.pull(by_id(cache_id, 1)), row(5, 1))
    assert not pair.owner.call(is_all_free)
    for each in (prefix(1), prefix(1, 5)):
        pair.owner.call(remove_key, each)
    assert pair.owner.call(is_all_free)


def test_a_prefix_id_is_not_mistaken_for_a_request_id(pair: Pair) -> None:
    pair.owner.call(allocate, [prefix(1)], 5, shape=(1, 1, 96))
    assert pair.refused(key(1)) is GONE
    pair.owner.call(allocate, [key(1)], 6, shape=(1, 1, 96))
    got = pair.node.rows_cache(1, 1, 96)
    pair.node.manager.pull_cache(key(1), got)
    assert np.array_equal(pair.node.arrays[got.cache_id].ravel(), make_array((1, 96), 6).ravel())
    pair.node.manager.pull_cache(prefix(1), got)
    assert np.array_equal(pair.node.arrays[got.cache_id].ravel(), make_array((1, 96), 5).ravel())
    assert status_of(pair.node.manager.pull_cache, key(1), got) is GONE


@pytest.mark.shows("keys.consumed")
def test_rows_pulled_into_blocks_use_their_key_up(pair: Pair) -> None:
    pair.owner.call(allocate_and_deallocate, [key(1), key(2)], 5)
    cache = pair.node.blocks_cache(4, 8, 32)
    for index in range(2):
        pair.node.manager.pull_blocks(key(index + 1), cache, (), [6, 1, 3])
        got = pair.node.arrays[cache.cache_id][:, [6, 1, 3]].reshape(4, 96)
        assert np.array_equal(got, row(5, index))
    pull = pair.node.manager.pull_blocks
    assert status_of(pull, key(1), cache, (), [6]) is GONE
    assert pair.owner.call(is_all_free)


def test_a_pull_of_some_bytes_uses_the_key_up(pair: Pair) -> None:
    pair.owner.call(allocate_and_deallocate, [key(1)], 5)
    got = pair.pull(key(1), size=10)
    assert np.array_equal(got[:, :10], row(5, 0)[:, :10])
    assert not got[:, 10:].any()
    assert pair.owner.call(is_all_free)


@pytest.mark.shows("keys.layered")
@pytest.mark.parametrize("by", ["key", "id"])
@pytest.mark.parametrize("pieces", [[0, 1], [1, 0], [0, 0, 1], [1, 1, 1, 0]], ids=str)
def test_layers_pulled_in_pieces_use_the_key_up_with_the_last(
    pair: Pair, pieces: list[int], by: str
) -> None:
    cache_id = pair.owner.call(allocate_and_deallocate, [PLACEHOLDER, key(1)], 5)
    source = key(1) if by == "key" else by_id(cache_id, 1)
    for layer in pieces:
        assert not pair.owner.call(is_all_free)
        layers = range(layer, layer + 1)
        got = pair.pull(source, src_layer_range=layers, dst_layer_range=layers)
        tensors = [2 * layer, 2 * layer + 1]
        assert np.array_equal(got[tensors], row(5, 1)[tensors])
        assert not got[[tensor for tensor in range(4) if tensor not in tensors]].any()
    assert pair.refused(source) is GONE
    assert pair.owner.call(is_all_free)


@pytest.mark.shows("keys.layered", "O17", "keys.prefix")
def test_each_key_counts_its_own_layers(pair: Pair) -> None:
    pair.owner.call(allocate_and_deallocate, [key(0), key(1), prefix(2)], 5)
    first, second = range(1), range(1, 2)
    assert np.array_equal(pair.pull(key(0)), row(5, 0))  # all of row 0
    half = pair.pull(key(1), src_layer_range=first, dst_layer_range=first)
    assert np.array_equal(half[:2], row(5, 1)[:2])
    assert not pair.owner.call(is_all_free)
    half = pair.pull(key(1), src_layer_range=second, dst_layer_range=first)
    assert np.array_equal(half[:2], row(5, 1)[2:])
    assert pair.refused(key(1)) is GONE
    for layers in (first, second):
        pair.pull(prefix(2), src_layer_range=layers, dst_layer_range=layers)
    assert not pair.owner.call(is_all_free)
    pair.owner.call(remove_key, prefix(2))
    assert pair.owner.call(is_all_free)


def test_a_whole_pull_ends_a_half_begun_one(pair: Pair) -> None:
    pair.owner.call(allocate_and_deallocate, [key(1)], 5)
    pair.pull(key(1), src_layer_range=range(1), dst_layer_range=range(1))
    assert np.array_equal(pair.pull(key(1)), row(5, 0))
    assert pair.owner.call(is_all_free)


def test_a_key_bound_anew_has_all_its_layers_to_give(pair: Pair) -> None:
    first = range(1)
    cache_id = pair.owner.call(allocate, [key(1)], 5)
    pair.pull(key(1), src_layer_range=first, dst_layer_range=first)
    pair.owner.call(remove_key, key(1))
    pair.owner.call(deallocate, cache_id)
    pair.owner.call(allocate_and_deallocate, [key(1)], 6)
    second = range(1, 2)
    pair.pull(key(1), src_layer_range=second, dst_layer_range=second)
    assert not pair.owner.call(is_all_free)
    assert np.array_equal(pair.pull(key(1)), row(6, 0))
    assert pair.owner.call(is_all_free)


@pytest.mark.shows("keys.consumed")
def test_pulls_that_fail_use_nothing_up(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate_and_deallocate, [key(1)], 5)
    manager = pair.node.manager
    too_long, three = pair.node.rows_cache(4, 1, 97), pair.node.rows_cache(3, 1, 96)
    for source in (key(1), by_id(cache_id, 0)):
        assert status_of(manager.pull_cache, source, too_long) is INVALID
        assert status_of(manager.pull_cache, source, three) is INVALID
        layers = range(2, 4)
        assert pair.refused(source, src_layer_range=layers, dst_layer_range=range(2)) is INVALID
        blocks = pair.node.blocks_cache(4, 8, 97)
        assert status_of(manager.pull_blocks, source, blocks, (), [0]) is INVALID
    assert pair.refused(by_id(cache_id, 3)) is GONE
    unmapped = manager.register_cache(desc_of(SHAPE), [4096] * 4)
    assert status_of(manager.pull_cache, key(1), unmapped) is INVALID
    assert not pair.owner.call(is_all_free)
    assert np.array_equal(pair.pull(key(1)), row(5, 0))
    assert pair.owner.call(is_all_free)


@pytest.mark.shows("keys.remote_accessible_persist")
def test_remote_access_uses_nothing_up(accessible: Pair) -> None:
    cache_id = accessible.owner.call(allocate, [key(1), prefix(2)], 5)
    blocks = accessible.node.blocks_cache(4, 3, 32)
    pull_blocks = accessible.node.manager.pull_blocks
    sources: list[CacheKey | CacheKeyByIdAndIndex] = [key(1), prefix(2), by_id(cache_id, 2)]
    for _ in range(2):
        assert np.array_equal(accessible.pull(by_id(cache_id, 0)), row(5, 0))
        for index, source in enumerate(sources):
            pull_blocks(source, blocks, (), [2, 0, 1])
            got = accessible.node.arrays[blocks.cache_id][:, [2, 0, 1]].reshape(4, 96)
            assert np.array_equal(got, row(5, index))
    accessible.owner.call(deallocate, cache_id)
    assert np.array_equal(accessible.pull(by_id(cache_id, 0)), row(5, 0))
    assert not accessible.owner.call(is_all_free)
    accessible.owner.call(remove_key, key(1))
    assert status_of(pull_blocks, key(1), blocks, (), [0]) is GONE
    assert np.array_equal(accessible.pull(by_id(cache_id, 0)), row(5, 0))
    accessible.owner.call(remove_key, prefix(2))
    assert accessible.refused(by_id(cache_id, 0)) is GONE
    assert status_of(pull_blocks, prefix(2), blocks, (), [0]) is GONE
    assert accessible.owner.call(is_all_free)


@pytest.mark.shows("cm.allocate_blocks_cache", "cm.deallocate_blocks_cache")
def test_blocks_are_freed_at_once_with_their_key(either: Pair) -> None:
    cache = either.node.blocks_cache(*SHAPE)
    pull = either.node.manager.pull_blocks
    for seed in range(1, 4):
        cache_id = either.owner.call(allocate_blocks, BlocksCacheKey(1, 5), seed)
        for _ in range(2):  # not used up
            pull(BlocksCacheKey(1, 5), cache, [2, 0], [0, 1])
            got = either.node.arrays[cache.cache_id][:, [0, 1]]
            assert np.array_equal(got, np.stack([row(seed, 2), row(seed, 0)], axis=1))
        either.owner.call(deallocate, cache_id)
        assert either.owner.call(is_all_free)
        assert status_of(pull, BlocksCacheKey(1, 5), cache, [0], [0]) is GONE
        assert status_of(either.pull, by_id(cache_id, 0)) is GONE


@pytest.mark.parametrize("model_id", [-1, -(2**70), 2**64])
def test_a_blocks_key_out_of_range_does_not_hide_the_other_caches(
    either: Pair, model_id: int
) -> None:
    either.owner.call(allocate_blocks, BlocksCacheKey(1, 5), 3, shape=(1, 1, 96))
    either.owner.call(try_to_allocate_blocks, BlocksCacheKey(1, model_id))
    cache = either.node.blocks_cache(1, 1, 96)
    either.node.manager.pull_blocks(BlocksCacheKey(1, 5), cache, [0], [0])
    got = either.node.arrays[cache.cache_id].ravel()
    assert np.array_equal(got, make_array((1, 96), 3).ravel())
    pull = either.node.manager.pull_blocks
    assert status_of(pull, BlocksCacheKey(1, model_id), cache, [0], [0]) in (SUCCESS, GONE)


def try_to_allocate_blocks(node: Node, key: BlocksCacheKey) -> None:
    """Whether such a key may be bound is not what the test asks."""
    with suppress(LLMException, ValueError):
        allocate_blocks(node, key, shape=(1, 1, 96))
