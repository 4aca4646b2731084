"""Keys of allocated caches: which are bound, and to what. Spec 6.1, 6.2."""

from __future__ import annotations

import cache_owner
import numpy as np
import pytest
from cache_owner import (
    GONE,
    INVALID,
    NO_ID,
    NO_MEMORY,
    PAGE,
    PLACEHOLDER,
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
    register,
    remove_key,
    row,
    status_of,
)

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
)
from llm_datadist.testing.cluster import Node, addrs_of, make_array

lone = cache_owner.lone
pair = cache_owner.pair


@pytest.mark.shows("keys.oom_first")
def test_lack_of_memory_comes_before_wrong_keys(lone: Node) -> None:
    too_many = [key(1), key(2)]
    assert status_of(allocate, lone, too_many, shape=(5, 1, PAGE)) is NO_MEMORY
    assert status_of(allocate, lone, too_many, shape=(4, 1, PAGE)) is INVALID
    assert is_all_free(lone)
    cache_id = allocate(lone, [key(1)], shape=(1, 1, PAGE))
    bound = [key(2), key(1)]
    assert status_of(allocate, lone, bound, shape=(4, 2, 1)) is NO_MEMORY
    assert status_of(allocate, lone, bound, shape=(3, 2, 1)) is INVALID
    assert status_of(allocate, lone, [key(2)], shape=(3, 1, 1)) is SUCCESS  # it was left unbound
    deallocate(lone, cache_id)
    remove_key(lone, key(1))  # and the other one bound
    assert status_of(allocate, lone, shape=(1, 1, PAGE)) is SUCCESS


@pytest.mark.shows("keys.fewer_than_rows", "error.34")
@pytest.mark.parametrize("extra", [key(9), PLACEHOLDER], ids=["key", "placeholder"])
def test_more_keys_than_rows_are_refused(lone: Node, extra: CacheKey) -> None:
    keys = [key(1), key(2), key(3), extra]
    assert status_of(allocate, lone, keys) is INVALID
    assert is_all_free(lone)
    assert status_of(allocate, lone, keys[:3]) is SUCCESS


@pytest.mark.shows("error.34")
@pytest.mark.parametrize("taken", [key(1), key(1, 7), prefix(1), prefix(1, 7)], ids=str)
def test_a_bound_key_is_refused_until_it_is_removed(lone: Node, taken: CacheKey) -> None:
    allocate(lone, [PLACEHOLDER, taken], shape=(1, 2, 8))
    again = CacheKey(55, taken.req_id, taken.model_id, taken.prefix_id)  # its cluster is no part
    assert status_of(allocate, lone, [again], shape=(1, 2, 8)) is INVALID
    assert status_of(allocate, lone, [key(2), again], shape=(1, 2, 8)) is INVALID
    assert status_of(allocate, lone, [key(2)], shape=(1, 2, 8)) is SUCCESS  # nothing was left
    remove_key(lone, again)
    assert status_of(allocate, lone, [taken], shape=(1, 2, 8)) is SUCCESS


def test_request_prefix_and_model_are_spaces_of_their_own(lone: Node) -> None:
    keys = [key(1), key(1, 7), prefix(1), prefix(1, 7)]
    for each in keys:
        assert status_of(allocate, lone, [each], shape=(1, 1, 8)) is SUCCESS


@pytest.mark.shows("error.34", "cm.remove_cache_key")
def test_a_key_of_a_registered_cache_is_bound_too(lone: Node) -> None:
    cache_id = register(lone, [key(1)])
    assert status_of(allocate, lone, [key(1)], shape=(1, 1, 8)) is INVALID
    remove_key(lone, key(1))
    assert status_of(allocate, lone, [key(1)], shape=(1, 1, 8)) is INVALID
    lone.manager.unregister_cache(cache_id)
    assert status_of(allocate, lone, [key(1)], shape=(1, 1, 8)) is SUCCESS


@pytest.mark.shows("error.34", "cm.allocate_blocks_cache")
def test_a_blocks_key_is_bound_once(lone: Node) -> None:
    first = allocate_blocks(lone, BlocksCacheKey(1, 5), shape=(1, 1, 8))
    again = BlocksCacheKey(2, 5)
    assert status_of(allocate_blocks, lone, again, shape=(1, 1, 8)) is INVALID
    assert status_of(allocate_blocks, lone, BlocksCacheKey(1, 6), shape=(1, 1, 8)) is SUCCESS
    # a placeholder of that model is no blocks key
    assert status_of(allocate, lone, [CacheKey(1, NO_ID, 5)], shape=(1, 1, 8)) is SUCCESS
    remove_key(lone, CacheKey(1, NO_ID, 5))
    assert status_of(allocate_blocks, lone, again, shape=(1, 1, 8)) is INVALID
    deallocate(lone, first)
    assert status_of(allocate_blocks, lone, again, shape=(1, 1, 8)) is SUCCESS


@pytest.mark.shows("O4", "cm.allocate_blocks_cache")
def test_the_description_is_not_marked_as_one_of_blocks(lone: Node) -> None:
    desc = desc_of((1, 2, 8))
    text, members = repr(desc), dict(vars(desc))
    addrs = addrs_of(make_array((1, 2, 8), 1))
    manager = lone.manager
    blocks = [manager.allocate_blocks_cache(desc), manager.register_blocks_cache(desc, addrs)]
    rows = [
        manager.allocate_cache(desc, [key(1), key(2)]),
        manager.register_cache(desc, addrs, [key(3)]),
    ]
    assert [cache.is_blocks_cache for cache in blocks + rows] == [True, True, False, False]
    assert all(cache.cache_desc is desc for cache in blocks + rows)
    for cache in rows:
        manager.copy_cache(cache, cache, 1, 0)
    for cache in blocks:
        manager.copy_blocks(cache, {0: [1]})
    assert (repr(desc), vars(desc)) == (text, members)


@pytest.mark.shows("D2", "error.34")
def test_of_a_key_given_twice_the_last_row_counts(pair: Pair) -> None:
    pair.owner.call(allocate, [key(1), key(2), key(1)], 3)
    assert np.array_equal(pair.pull(key(1)), row(3, 2))
    assert pair.refused(key(1)) is GONE
    assert np.array_equal(pair.pull(key(2)), row(3, 1))


@pytest.mark.shows("D2")
def test_a_key_given_twice_holds_one_reference(lone: Node) -> None:
    cache_id = allocate(lone, [key(1), key(1), key(1)])
    deallocate(lone, cache_id)
    assert not is_all_free(lone)
    remove_key(lone, key(1))
    assert is_all_free(lone)


@pytest.mark.shows("keys.fewer_than_rows")
def test_rows_without_a_key_can_be_pulled_by_id(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate, [key(1)], 3)
    for index in range(3):
        assert np.array_equal(pair.pull(by_id(cache_id, index)), row(3, index))


def test_a_key_with_both_ids_is_bound_by_its_prefix(pair: Pair) -> None:
    pair.owner.call(allocate, [CacheKey(1, 1, 0, 2)], 3)
    assert np.array_equal(pair.pull(prefix(2)), row(3, 0))
    assert pair.refused(key(1)) is GONE
    assert np.array_equal(pair.pull(prefix(2)), row(3, 0))


def test_one_id_may_name_a_row_for_each_model(pair: Pair) -> None:
    pair.owner.call(allocate_and_deallocate, [key(1, 5), key(1, 6)], 3)
    assert np.array_equal(pair.pull(key(1, 6)), row(3, 1))
    assert pair.refused(key(1, 6)) is GONE
    assert np.array_equal(pair.pull(key(1, 5)), row(3, 0))
    assert pair.owner.call(is_all_free)


@pytest.mark.shows("D3")
def test_any_number_of_placeholders_leaves_rows_without_a_key(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate, [PLACEHOLDER, PLACEHOLDER, key(1)], 3)
    assert np.array_equal(pair.pull(key(1)), row(3, 2))
    for index in range(3):
        assert np.array_equal(pair.pull(by_id(cache_id, index)), row(3, index))


@pytest.mark.shows("tables.ids")
def test_ids_count_allocated_and_registered_caches_together(lone: Node) -> None:
    ids = [allocate(lone, shape=(1, 1, 8)), lone.rows_cache().cache_id]
    ids.append(allocate_blocks(lone, shape=(1, 1, 8)))
    deallocate(lone, ids[2])
    ids.append(allocate(lone, shape=(1, 1, 8)))
    assert ids == [1, 2, 3, 4]
