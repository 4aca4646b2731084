"""Registered caches: memory of the caller's, its keys, who may reach it. Spec 6.2, 6.4."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import cache_owner
import numpy as np
import pytest
from cache_owner import (
    DEVICE,
    GONE,
    HOST,
    INVALID,
    NO_ID,
    PLACEHOLDER,
    SHAPE,
    SUCCESS,
    Pair,
    by_id,
    desc_of,
    key,
    prefix,
    remove_key,
    status_of,
    unregister,
)

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    Placement,
)
from llm_datadist.testing.cluster import Bytes, Node, addrs_of, make_array

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

accessible = cache_owner.accessible
either = cache_owner.either
pair = cache_owner.pair
lone = cache_owner.lone


def row(seed: int, index: int) -> Bytes:
    return make_array(SHAPE, seed)[:, index]


# -- run by the owner ------------------------------------------------------------------------------


def register_rows(
    node: Node,
    keys: Sequence[CacheKey] = (),
    seed: int = 1,
    placement: Placement = DEVICE,
    remote_accessible: bool | None = None,
) -> int:
    return node.rows_cache(*SHAPE, seed, keys, placement, remote_accessible).cache_id


def register_blocks(
    node: Node,
    key: BlocksCacheKey | None = None,
    seed: int = 1,
    placement: Placement = DEVICE,
    remote_accessible: bool | None = None,
) -> int:
    return node.blocks_cache(*SHAPE, seed, key, placement, remote_accessible).cache_id


def register_again(node: Node, cache_id: int, keys: Sequence[CacheKey]) -> int:
    """Another cache on the memory of one that is there."""
    array = node.arrays[cache_id]
    return node.manager.register_cache(desc_of(SHAPE), addrs_of(array), keys).cache_id


def register_many(node: Node, count: int, row_nbytes: int, keys: Sequence[CacheKey]) -> int:
    """A cache of many tensors of one row, one behind the other."""
    return node.rows_cache(count, 1, row_nbytes, 1, keys).cache_id


def pull_blocks(pair: Pair, model_id: int) -> Bytes:
    """Blocks 2 and 0 of the owner's cache."""
    cache = pair.node.blocks_cache(*SHAPE)
    pair.node.manager.pull_blocks(BlocksCacheKey(1, model_id), cache, [2, 0], [0, 1])
    return pair.node.arrays[cache.cache_id][:, :2]


def blocks(seed: int) -> Bytes:
    return make_array(SHAPE, seed)[:, [2, 0]]


# -- what is pulled --------------------------------------------------------------------------------


@pytest.mark.shows("cm.register_cache", "keys.registered_persist")
@pytest.mark.parametrize("placement", [HOST, DEVICE], ids=str)
def test_registered_rows_are_pulled_by_key_and_by_id_any_number_of_times(
    pair: Pair, placement: Placement
) -> None:
    keys = [key(1), PLACEHOLDER, prefix(2)]
    cache_id = pair.owner.call(register_rows, keys, 5, placement, True)
    for _ in range(2):
        assert np.array_equal(pair.pull(key(1)), row(5, 0))
        assert np.array_equal(pair.pull(prefix(2)), row(5, 2))
        for index in range(3):
            assert np.array_equal(pair.pull(by_id(cache_id, index)), row(5, index))


@pytest.mark.shows("keys.registered_persist")
def test_layers_of_a_registered_row_are_pulled_again_and_again(pair: Pair) -> None:
    pair.owner.call(register_rows, [key(1)], 5)
    for layer in (0, 1, 0, 1, 1):
        layers = range(layer, layer + 1)
        got = pair.pull(key(1), src_layer_range=layers, dst_layer_range=layers)
        tensors = [2 * layer, 2 * layer + 1]
        assert np.array_equal(got[tensors], row(5, 0)[tensors])


@pytest.mark.shows("cm.register_cache")
def test_what_is_pulled_is_what_the_memory_holds_at_that_moment(pair: Pair) -> None:
    cache_id = pair.owner.call(register_rows, [key(1)], 5)
    pair.owner.call(overwrite, cache_id, 9)
    assert np.array_equal(pair.pull(key(1)), row(9, 0))


def overwrite(node: Node, cache_id: int, seed: int) -> None:
    node.arrays[cache_id][:] = make_array(SHAPE, seed)


@pytest.mark.shows("cm.register_cache")
def test_the_cache_has_the_addresses_and_the_description_that_were_given(lone: Node) -> None:
    array = make_array((2, 3, 96), 1)
    desc = CacheDesc(2, (3, 96), DataType.DT_INT8)
    addrs = addrs_of(array)
    cache = lone.manager.register_cache(desc, addrs)
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache) == (1, addrs, False)
    assert cache.cache_desc is desc
    cache = lone.manager.register_blocks_cache(desc, addrs)
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache) == (2, addrs, True)


@pytest.mark.shows("cm.register_blocks_cache")
@pytest.mark.parametrize("placement", [HOST, DEVICE], ids=str)
def test_registered_blocks_are_pulled_by_their_key(either: Pair, placement: Placement) -> None:
    either.owner.call(register_blocks, None, 4, placement, True)
    assert status_of(pull_blocks, either, 0) is GONE  # without a key it has no name
    either.owner.call(register_blocks, BlocksCacheKey(77, 0), 5, placement, True)
    for _ in range(2):
        assert np.array_equal(pull_blocks(either, 0), blocks(5))
    assert status_of(pull_blocks, either, 1) is GONE


@pytest.mark.shows("D9")
def test_more_than_240_addresses_are_registered(pair: Pair) -> None:
    ids = [pair.owner.call(register_many, 300, 64, [key(i)]) for i in range(2)]
    for name in (key(0), key(1), by_id(ids[0]), by_id(ids[1])):
        cache = pair.node.rows_cache(300, 1, 64)
        pair.node.manager.pull_cache(name, cache)
        expected = make_array((300, 1, 64), 1)
        assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


def test_tensors_that_touch_in_memory_are_pulled_whole(either: Pair) -> None:
    cache_id = either.owner.call(register_many, 4, 96, ())
    expected = make_array((4, 1, 96), 1)
    rows = either.node.rows_cache(4, 1, 96)
    either.node.manager.pull_cache(by_id(cache_id), rows)
    assert np.array_equal(either.node.arrays[rows.cache_id], expected)
    paged = either.node.blocks_cache(4, 3, 32)
    either.node.manager.pull_blocks(by_id(cache_id), paged, (), [0, 1, 2])
    assert np.array_equal(either.node.arrays[paged.cache_id], expected.reshape(4, 3, 32))


def test_tensors_that_touch_in_memory_are_pushed_whole(accessible: Pair) -> None:
    cache_id = accessible.owner.call(register_many, 4, 96, ())
    rows = accessible.node.rows_cache(4, 1, 96, seed=2)
    accessible.node.manager.push_cache(by_id(cache_id), rows)
    assert np.array_equal(accessible.owner.call(array_of, cache_id), make_array((4, 1, 96), 2))


def array_of(node: Node, cache_id: int) -> Bytes:
    return node.arrays[cache_id]


@pytest.mark.shows("cm.register_cache")
def test_unmapped_addresses_are_accepted_with_one_warning(
    lone: Node, caplog: pytest.LogCaptureFixture
) -> None:
    mapped = make_array((1, 4096), 1)
    addrs = [4096, *addrs_of(mapped), 8192]
    with caplog.at_level(logging.WARNING, "LLM_DATADIST"):
        cache = lone.manager.register_cache(desc_of((3, 1, 4096)), addrs)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "mapped at 2 of 3 addresses, the first is 0x1000 (+4096 bytes)" in record.message
    assert (cache.cache_id, cache.tensor_addrs) == (1, addrs)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "LLM_DATADIST"):
        lone.manager.register_cache(desc_of((1, 1, 4096)), addrs_of(mapped))
    assert not caplog.records


# -- keys ------------------------------------------------------------------------------------------


@pytest.mark.shows("keys.blocks_overwrite", "cm.register_blocks_cache")
def test_blocks_registered_under_a_bound_key_take_it_over(either: Pair) -> None:
    ids = []
    for seed in range(1, 4):
        ids.append(either.owner.call(register_blocks, BlocksCacheKey(1, 5), seed))
        assert np.array_equal(pull_blocks(either, 5), blocks(seed))
    either.owner.call(unregister, ids[0])  # which has no key any more
    assert np.array_equal(pull_blocks(either, 5), blocks(3))
    either.owner.call(unregister, ids[2])
    assert status_of(pull_blocks, either, 5) is GONE  # it does not fall back to an older one


@pytest.mark.shows("keys.first_registered_wins")
@pytest.mark.parametrize("bound", [key(1), key(1, 7), prefix(1)], ids=str)
def test_rows_registered_under_a_bound_key_leave_it_where_it_is(
    pair: Pair, bound: CacheKey
) -> None:
    first = pair.owner.call(register_rows, [PLACEHOLDER, bound], 1)
    second = pair.owner.call(register_rows, [bound, key(9)], 2)
    assert np.array_equal(pair.pull(bound), row(1, 1))
    assert np.array_equal(pair.pull(key(9)), row(2, 1))
    assert np.array_equal(pair.pull(by_id(second, 0)), row(2, 0))
    pair.owner.call(unregister, second)
    assert np.array_equal(pair.pull(bound), row(1, 1))
    pair.owner.call(unregister, first)
    assert pair.refused(bound) is GONE
    pair.owner.call(register_rows, [bound], 3)
    assert np.array_equal(pair.pull(bound), row(3, 0))


@pytest.mark.shows("keys.first_registered_wins")
def test_of_a_key_given_twice_to_register_the_first_row_counts(pair: Pair) -> None:
    pair.owner.call(register_rows, [key(1), key(1)], 3)
    assert np.array_equal(pair.pull(key(1)), row(3, 0))


@pytest.mark.shows("D3")
def test_placeholders_are_registered_in_any_number(pair: Pair) -> None:
    pair.owner.call(register_rows, [PLACEHOLDER, PLACEHOLDER, key(1)], 3)
    assert np.array_equal(pair.pull(key(1)), row(3, 2))


@pytest.mark.shows("keys.fewer_than_rows")
def test_a_key_of_a_registered_row_that_is_not_there_leads_nowhere(pair: Pair) -> None:
    pair.owner.call(register_rows, [key(0), key(1), key(2), key(3)], 3)
    assert pair.refused(key(3)) is GONE
    assert np.array_equal(pair.pull(key(2)), row(3, 2))


@pytest.mark.shows("cm.remove_cache_key")
def test_a_key_of_a_registered_cache_is_not_removed(pair: Pair) -> None:
    pair.owner.call(register_rows, [key(1), prefix(2)], 3)
    for each in (key(1), prefix(2), key(9)):
        pair.owner.call(remove_key, each)
    assert np.array_equal(pair.pull(key(1)), row(3, 0))
    assert np.array_equal(pair.pull(prefix(2)), row(3, 1))


# -- who may reach it ------------------------------------------------------------------------------


@pytest.mark.shows("cm.register.remote_accessible")
@pytest.mark.parametrize(
    ("placement", "remote_accessible", "expected"),
    [
        (DEVICE, None, SUCCESS),
        (DEVICE, True, SUCCESS),
        (DEVICE, False, INVALID),
        (HOST, None, INVALID),
        (HOST, True, SUCCESS),
        (HOST, False, INVALID),
    ],
)
def test_whether_peers_may_reach_it_is_said_or_follows_from_the_placement(
    either: Pair, placement: Placement, remote_accessible: bool | None, expected: object
) -> None:
    rows_id = either.owner.call(register_rows, (), 1, placement, remote_accessible)
    name = BlocksCacheKey(1, 0)
    either.owner.call(register_blocks, name, 1, placement, remote_accessible)
    assert either.refused(by_id(rows_id, 1)) is expected
    assert status_of(pull_blocks, either, 0) is expected
    if expected is SUCCESS:
        assert np.array_equal(either.pull(by_id(rows_id, 1)), row(1, 1))
        assert np.array_equal(pull_blocks(either, 0), blocks(1))


@pytest.mark.shows("cm.register.remote_accessible")
def test_what_peers_may_not_reach_is_copied_within_the_process(lone: Node) -> None:
    cache = lone.rows_cache(*SHAPE, seed=1, remote_accessible=False)
    lone.manager.copy_cache(cache, cache, 2, 0)
    array = lone.arrays[cache.cache_id]
    assert np.array_equal(array[:, 2], row(1, 0))
    assert np.array_equal(array[:, 1], row(1, 1))


@pytest.mark.shows("cm.register.remote_accessible", "error.38")
@pytest.mark.parametrize("placement", [HOST, DEVICE], ids=str)
def test_after_a_rank_table_link_remote_access_cannot_be_asked_for(
    lone: Node, placement: Placement
) -> None:
    assert status_of(register_rows, lone, (), 1, placement, True) is SUCCESS
    table = '{"server_list":[{"device":[{}]}]}'
    comm_id = lone.datadist.link(f"kv-{os.getpid()}", {1: 0, 2: 1}, table)
    for register in (register_rows, register_blocks):
        assert status_of(register, lone, placement=placement, remote_accessible=True) is INVALID
        assert status_of(register, lone, placement=placement, remote_accessible=False) is SUCCESS
        assert status_of(register, lone, placement=placement) is SUCCESS
    lone.datadist.unlink(comm_id)
    assert status_of(register_rows, lone, remote_accessible=True) is INVALID


# -- unregistering ---------------------------------------------------------------------------------


@pytest.mark.shows("cm.unregister_cache")
def test_an_unregistered_cache_is_gone_with_its_keys(pair: Pair) -> None:
    rows_id = pair.owner.call(register_rows, [key(1), prefix(2)], 1)
    pair.owner.call(register_blocks, BlocksCacheKey(1, 5), 2)
    assert np.array_equal(pair.pull(key(1)), row(1, 0))
    assert np.array_equal(pull_blocks(pair, 5), blocks(2))
    pair.owner.call(unregister, rows_id)
    for name in (key(1), prefix(2), by_id(rows_id, 0)):
        assert pair.refused(name) is GONE
    assert np.array_equal(pull_blocks(pair, 5), blocks(2))
    pair.owner.call(unregister, rows_id + 1)
    assert status_of(pull_blocks, pair, 5) is GONE


@pytest.mark.shows("cm.unregister_cache")
@pytest.mark.parametrize("cache_id", [-(2**63), -1, 0, 2, 2**63 - 1])
def test_unregistering_what_never_was_does_nothing(lone: Node, cache_id: int) -> None:
    cache = lone.rows_cache(*SHAPE, seed=1)
    lone.manager.unregister_cache(cache_id)
    lone.manager.copy_cache(cache, cache, 1, 0)
    for _ in range(2):
        lone.manager.unregister_cache(cache.cache_id)
    assert status_of(lone.manager.copy_cache, cache, cache) is GONE


@pytest.mark.shows("cm.unregister_cache")
@pytest.mark.parametrize(
    ("cache_id", "expected"),
    [(None, TypeError), ("1", TypeError), (1.0, TypeError), (True, TypeError),
     (2**63, ValueError), (-(2**63) - 1, ValueError)],
)  # fmt: skip
def test_what_is_no_id_is_not_unregistered(
    lone: Node, cache_id: Any, expected: type[Exception]
) -> None:
    with pytest.raises(expected):
        lone.manager.unregister_cache(cache_id)


@pytest.mark.shows("O20")
@pytest.mark.parametrize("gone", [0, 1], ids=["first-goes", "second-goes"])
def test_of_two_caches_on_the_same_memory_one_stays_when_the_other_goes(
    either: Pair, gone: int
) -> None:
    first = either.owner.call(register_rows, [key(1)], 6)
    ids = first, either.owner.call(register_again, first, [key(2)])
    for cache_id in ids:
        assert np.array_equal(either.pull(by_id(cache_id, 1)), row(6, 1))
    either.owner.call(unregister, ids[gone])
    assert either.refused(by_id(ids[gone], 1)) is GONE
    for index in range(3):
        assert np.array_equal(either.pull(by_id(ids[1 - gone], index)), row(6, index))


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture(params=["register_cache", "register_blocks_cache"])
def register(lone: Node, request: pytest.FixtureRequest) -> Callable[..., Cache]:
    """Either call."""
    call: Callable[..., Cache] = getattr(lone.manager, request.param)
    return call


@pytest.mark.shows("error.36")
@pytest.mark.parametrize(
    "addrs", [[], [4096], [4096] * 3, [4096, 0], [0, 4096], [-1, 4096], [2**64 - 1, 4096]], ids=str
)
def test_addresses_that_cannot_be(register: Callable[..., Cache], addrs: list[int]) -> None:
    assert status_of(register, desc_of((2, 1, 64)), addrs) is INVALID


@pytest.mark.shows("error.36")
def test_a_null_address_of_rows_is_refused_of_any_placement(lone: Node) -> None:
    assert status_of(lone.manager.register_cache, desc_of((2, 1, 64), HOST), [4096, 0]) is INVALID


@pytest.mark.shows("error.37")
@pytest.mark.parametrize("addrs", [(4096, 8192), None, 4096, "addrs", ["1", 2], [1.0, 2], [True]])
def test_addresses_are_a_list_of_numbers(register: Callable[..., Cache], addrs: object) -> None:
    with pytest.raises(TypeError, match="addrs"):
        register(desc_of((2, 1, 64)), addrs)


@pytest.mark.shows("error.37")
@pytest.mark.parametrize("value", [1, 0, "True", [True]])
def test_remote_accessible_is_a_bool(register: Callable[..., Cache], value: object) -> None:
    with pytest.raises(TypeError, match="remote_accessible"):
        register(desc_of((1, 1, 64)), [4096], remote_accessible=value)


@pytest.mark.shows("error.39")
def test_a_description_is_needed(register: Callable[..., Cache]) -> None:
    with pytest.raises(AttributeError, match="cache_desc"):
        register(None, [4096])
    for desc in ("desc", [1, 64], 1):
        with pytest.raises(TypeError, match="cache_desc"):
            register(desc, [4096])


@pytest.mark.shows("error.39")
def test_keys_are_of_the_kind_of_the_cache(lone: Node) -> None:
    manager: Any = lone.manager
    desc = desc_of((1, 1, 64))
    for keys in (None, key(1), [None], [BlocksCacheKey(1, 0)], {key(1)}):
        with pytest.raises(TypeError, match="cache_keys"):
            manager.register_cache(desc, [4096], keys)
    for name in (key(1), [BlocksCacheKey(1, 0)], 5):
        with pytest.raises(TypeError, match="blocks_cache_key"):
            manager.register_blocks_cache(desc, [4096], name)


@pytest.mark.shows("error.39")
def test_none_is_no_key_or_cache_to_transfer(lone: Node) -> None:
    manager: Any = lone.manager
    rows, paged = lone.rows_cache(), lone.blocks_cache()
    for call, *arguments in (
        (manager.pull_cache, None, rows),
        (manager.pull_cache, key(1), None),
        (manager.pull_blocks, None, paged, [0], [0]),
        (manager.pull_blocks, BlocksCacheKey(1, 0), None, [0], [0]),
    ):
        with pytest.raises(AttributeError):
            call(*arguments)


# -- keys to be checked ----------------------------------------------------------------------------


@pytest.mark.shows("cm.check_cache_key")
@pytest.mark.parametrize(
    ("req_id", "prefix_id", "expected"),
    [
        (1, NO_ID, SUCCESS),
        (0, NO_ID, SUCCESS),
        (NO_ID, 1, SUCCESS),
        (NO_ID, 0, SUCCESS),
        (NO_ID, NO_ID, INVALID),
        (1, 1, INVALID),
        (0, 0, INVALID),
    ],
)
def test_a_key_to_pull_by_has_one_id(
    lone: Node, req_id: int, prefix_id: int, expected: object
) -> None:
    name = CacheKey(1, req_id, 0, prefix_id)
    assert status_of(type(lone.manager).check_cache_key, name) is expected
    assert status_of(lone.manager.check_cache_key, name) is expected


@pytest.mark.shows("cm.check_cache_key")
def test_only_a_cache_key_is_checked(lone: Node) -> None:
    check: Any = lone.manager.check_cache_key
    with pytest.raises(AttributeError):
        check(None)
    for name in (BlocksCacheKey(1, 0), by_id(1), 1):
        with pytest.raises(TypeError):
            check(name)
