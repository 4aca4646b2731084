"""Allocated caches: what is refused, deallocating, memory at both ends. Spec 6.3, 6.5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cache_owner
import numpy as np
import pytest
from cache_owner import (
    DEVICE,
    GONE,
    HOST,
    INVALID,
    NO_MEMORY,
    PAGE,
    PLACEHOLDER,
    SHAPE,
    SUCCESS,
    WHOLE_POOL,
    Pair,
    allocate,
    allocate_blocks,
    by_id,
    bytes_of,
    deallocate,
    desc_of,
    fill,
    is_all_free,
    key,
    pool,
    prefix,
    register,
    remove_key,
    row,
    starts,
    status_of,
    unregister,
    view,
)

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from llm_datadist.testing.cluster import Node, NodeProcess, addrs_of, make_array

if TYPE_CHECKING:
    from collections.abc import Callable

either = cache_owner.either
lone = cache_owner.lone
pair = cache_owner.pair


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.shows("tables.desc", "error.32")
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((0, 1, 1), INVALID),
        ((1, 0, 1), INVALID),
        ((1, 1, -1), INVALID),
        ((1, *[1] * 31), SUCCESS),
        ((1, *[1] * 32), INVALID),
        ((1, *[1] * 33), INVALID),
        ((1, 2**31, 2**31, 2), INVALID),
        ((1, 2**31, 2**31), NO_MEMORY),
    ],
)
def test_shapes_that_cannot_be_allocated(
    node: Node, shape: tuple[int, ...], expected: LLMStatusCode
) -> None:
    manager = starts(node, mem_pool_cfg=pool(WHOLE_POOL)).manager
    assert status_of(manager.allocate_cache, desc_of(shape)) is expected
    assert status_of(manager.allocate_blocks_cache, desc_of(shape)) is expected


@pytest.mark.shows("tables.desc")
@pytest.mark.parametrize("dims", [[], [0], [3, 0], [3, -1], [1] * 32, [2**31, 2**31, 2]], ids=str)
def test_no_cache_of_such_a_shape_is_registered(lone: Node, dims: list[int]) -> None:
    def describe_and_register(register: Callable[..., Cache]) -> Cache:
        return register(CacheDesc(1, dims, DataType.DT_INT8), [4096])

    assert status_of(describe_and_register, lone.manager.register_cache) is INVALID
    assert status_of(describe_and_register, lone.manager.register_blocks_cache) is INVALID


@pytest.mark.shows("tables.desc")
@pytest.mark.parametrize("rank", [1, 2, 31])
def test_a_cache_may_have_up_to_31_dims(lone: Node, rank: int) -> None:
    desc = CacheDesc(1, [3] + [1] * (rank - 1), DataType.DT_INT8)
    array = make_array((1, 3), 1)
    registered = lone.manager.register_cache(desc, addrs_of(array))
    allocated = lone.manager.allocate_cache(desc)
    lone.manager.copy_cache(allocated, registered, 2, 1)
    assert view(allocated)[0][2] == array[0, 1]


@pytest.mark.shows("error.32")
def test_a_description_without_a_data_type_or_tensors_is_refused(lone: Node) -> None:
    untyped = CacheDesc(1, [1], None)  # type: ignore[arg-type]  # as the reference takes it
    for desc in (untyped, desc_of((0, 1, 1))):
        assert status_of(lone.manager.allocate_cache, desc) is INVALID
        assert status_of(lone.manager.allocate_blocks_cache, desc) is INVALID
    assert is_all_free(lone)


@pytest.mark.shows("error.39")
def test_arguments_of_the_wrong_type(node: Node) -> None:
    manager: Any = starts(node, mem_pool_cfg=pool(WHOLE_POOL)).manager
    desc = desc_of((1, 1, 1))
    for call in (manager.allocate_cache, manager.allocate_blocks_cache):
        with pytest.raises(TypeError):
            call("desc")
        with pytest.raises(AttributeError):
            call(None)
        with pytest.raises(TypeError):
            call(desc, key(1))
    for keys in ([BlocksCacheKey(1, 0)], [None], {key(1)}, 5):
        with pytest.raises(TypeError):
            manager.allocate_cache(desc, keys)
    with pytest.raises(TypeError):
        manager.allocate_blocks_cache(desc, [BlocksCacheKey(1, 0)])
    for call in (manager.deallocate_cache, manager.deallocate_blocks_cache):
        with pytest.raises(AttributeError):
            call(None)
        with pytest.raises(TypeError):
            call(1)
    with pytest.raises(AttributeError):
        manager.remove_cache_key(None)
    with pytest.raises(TypeError):
        manager.remove_cache_key(BlocksCacheKey(1, 0))
    with pytest.raises(TypeError):
        manager.remove_cache_key(by_id(1))


# -- deallocating ----------------------------------------------------------------------------------


@pytest.mark.shows("cm.deallocate_cache", "cm.deallocate_blocks_cache", "D28")
def test_deallocating_again_does_nothing(lone: Node) -> None:
    first = lone.manager.allocate_cache(desc_of((4, 1, PAGE)))
    assert len(first.tensor_addrs) == 4
    lone.manager.deallocate_cache(first)
    assert (first.tensor_addrs, first.cache_id) == ([], 1)
    second = lone.manager.allocate_cache(desc_of((4, 1, PAGE)), [key(1)])
    for _ in range(2):
        lone.manager.deallocate_cache(first)
    assert not is_all_free(lone)
    for _ in range(3):
        lone.manager.deallocate_cache(second)
        assert second.tensor_addrs == []
        assert not is_all_free(lone)
    remove_key(lone, key(1))
    assert is_all_free(lone)
    blocks = lone.manager.allocate_blocks_cache(desc_of((4, 1, PAGE)))
    blocks_id = blocks.cache_id
    for _ in range(2):
        lone.manager.deallocate_blocks_cache(blocks)
        assert (blocks.tensor_addrs, blocks.cache_id) == ([], blocks_id)
        assert is_all_free(lone)


@pytest.mark.shows("error.55")
def test_each_kind_has_its_call(lone: Node) -> None:
    rows = lone.manager.allocate_cache(desc_of((2, 1, PAGE)))
    blocks = lone.manager.allocate_blocks_cache(desc_of((2, 1, PAGE)))
    assert status_of(lone.manager.deallocate_blocks_cache, rows) is INVALID
    assert status_of(lone.manager.deallocate_cache, blocks) is INVALID
    assert (len(rows.tensor_addrs), len(blocks.tensor_addrs)) == (2, 2)
    assert status_of(allocate, lone, shape=(1, 1, 1)) is NO_MEMORY


@pytest.mark.shows(
    "cm.deallocate_cache",
    "cm.deallocate_blocks_cache",
    "cm.remove_cache_key",
    "keys.registered_persist",
)
def test_registered_and_cpu_caches_are_not_freed(pair: Pair) -> None:
    cache_id = pair.owner.call(register, [key(1)])
    pair.owner.call(deallocate, cache_id)
    pair.owner.call(remove_key, key(1))
    for _ in range(2):
        assert np.array_equal(pair.pull(key(1)), make_array(SHAPE, 1)[:, 0])
    assert pair.owner.call(deallocate_cpu_cache)


def deallocate_cpu_cache(node: Node) -> bool:
    array = make_array((1, 64), 3)
    cache = Cache.create_cpu_cache(desc_of((1, 1, 64), HOST), [int(array.ctypes.data)])
    node.manager.deallocate_blocks_cache(cache)
    return bool(np.array_equal(array, make_array((1, 64), 3)))


@pytest.mark.shows("cm.remove_cache_key")
def test_unknown_keys_and_placeholders_are_removed_without_effect(lone: Node) -> None:
    allocate(lone, [key(1)], shape=(4, 1, PAGE))
    for each in (key(2), key(1, 1), prefix(1), PLACEHOLDER, CacheKey(1, 1, prefix_id=1)):
        remove_key(lone, each)
    assert status_of(allocate, lone, [key(1)], shape=(1, 1, 1)) is NO_MEMORY
    deallocate(lone, 1)
    assert not is_all_free(lone)
    remove_key(lone, key(1))
    assert is_all_free(lone)


@pytest.mark.shows("O19")
def test_an_allocated_cache_cannot_be_unregistered(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate, [key(1)], 5)
    pair.owner.call(unregister, cache_id)
    assert np.array_equal(pair.pull(by_id(cache_id, 1)), row(5, 1))
    assert np.array_equal(pair.pull(key(1)), row(5, 0))
    assert not pair.owner.call(is_all_free)
    pair.owner.call(deallocate, cache_id)
    assert pair.owner.call(is_all_free)


@pytest.mark.shows("cm.deallocate_blocks_cache")
def test_a_blocks_cache_frees_its_memory_though_its_key_was_never_pulled(lone: Node) -> None:
    cache = lone.manager.allocate_blocks_cache(desc_of(SHAPE), BlocksCacheKey(1, 5))
    assert not is_all_free(lone)
    lone.manager.deallocate_blocks_cache(cache)
    assert (cache.tensor_addrs, cache.cache_id) == ([], 1)
    assert is_all_free(lone)
    assert status_of(allocate_blocks, lone, BlocksCacheKey(1, 5)) is SUCCESS


@pytest.mark.shows("D28")
@pytest.mark.parametrize("cache_id", [-1, 0, 99, 2**63 - 1])
def test_deallocating_what_never_was_does_nothing(lone: Node, cache_id: int) -> None:
    manager = lone.manager
    allocate(lone)
    manager.deallocate_cache(Cache(cache_id, desc_of(SHAPE), [], manager, False, False))
    manager.deallocate_blocks_cache(Cache(cache_id, desc_of(SHAPE), [], manager, False, True))
    assert not is_all_free(lone)


@pytest.mark.shows("cm.deallocate_cache", "error.54")
def test_a_deallocated_cache_is_known_no_more(lone: Node) -> None:
    freed = lone.manager.allocate_cache(desc_of(SHAPE))
    lone.manager.deallocate_cache(freed)
    blocks = lone.manager.allocate_blocks_cache(desc_of(SHAPE))
    lone.manager.deallocate_blocks_cache(blocks)
    other = lone.rows_cache(*SHAPE)
    assert status_of(lone.manager.copy_cache, other, freed) is GONE
    assert status_of(lone.manager.copy_cache, freed, other) is GONE
    assert status_of(lone.manager.copy_blocks, blocks, {0: [1]}) is GONE
    assert status_of(lone.manager.pull_cache, CacheKey(9, 1), freed) is GONE


@pytest.mark.shows("tables.ids")
def test_finalize_frees_everything_and_ids_begin_anew(lone: Node) -> None:
    manager = lone.manager
    cache = manager.allocate_cache(desc_of((4, 1, PAGE)), [key(1)])
    lone.stop()
    assert status_of(manager.deallocate_cache, cache) is LLMStatusCode.LLM_ENGINE_FINALIZED
    starts(lone, mem_pool_cfg=pool(WHOLE_POOL))
    assert allocate(lone, [key(1)], shape=(4, 1, PAGE)) == 1


# -- memory of others ------------------------------------------------------------------------------


def test_memory_with_a_new_owner_is_never_read_by_the_old_names(either: Pair) -> None:
    blocks = either.node.blocks_cache(4, 3, 32)
    pull_blocks = either.node.manager.pull_blocks
    old_id = either.owner.call(allocate, [key(1), prefix(1)], 1)
    pull_blocks(prefix(1), blocks, (), [0, 1, 2])
    assert np.array_equal(either.pull(by_id(old_id, 1)), row(1, 1))
    for seed in range(2, 6):
        for each in (key(1), prefix(1)):
            either.owner.call(remove_key, each)
        either.owner.call(deallocate, old_id)
        new_id = either.owner.call(allocate, [key(1 + seed)], seed)  # the very same memory
        assert [either.refused(by_id(old_id, index)) for index in range(3)] == [GONE] * 3
        for each in (key(1), prefix(1)):
            assert status_of(pull_blocks, each, blocks, (), [0, 1, 2]) is GONE
        either.owner.call(remove_key, key(1 + seed))
        either.owner.call(deallocate, new_id)
        old_id = either.owner.call(allocate, [key(1), prefix(1)], 10 * seed)
        pull_blocks(prefix(1), blocks, (), [0, 1, 2])
        got = either.node.arrays[blocks.cache_id].reshape(4, 96)
        assert np.array_equal(got, row(10 * seed, 1))


@pytest.mark.parametrize("theirs", [DEVICE, HOST], ids=["from-device", "from-host"])
@pytest.mark.parametrize("ours", [DEVICE, HOST], ids=["to-device", "to-host"])
def test_allocated_memory_at_both_ends(
    node: Node, peer: NodeProcess, path: str, theirs: Placement, ours: Placement
) -> None:
    settings = {
        "transfer_path": path,
        "mem_pool_cfg": pool(2 * WHOLE_POOL),
        "host_mem_pool_cfg": pool(2 * WHOLE_POOL),
    }
    listen = "127.0.0.1:0"
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info=listen, **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) is SUCCESS
    peer.call(allocate, [key(1), key(2)], 5, placement=theirs)
    target = node.manager.allocate_cache(desc_of(SHAPE, ours))
    neighbour = node.manager.allocate_cache(desc_of(SHAPE, ours))
    fill(target, 8)
    fill(neighbour, 9)
    expected, kept = bytes_of(target), bytes_of(neighbour)
    node.manager.pull_cache(key(2), target, 2)
    expected[:, 2] = row(5, 1)
    assert np.array_equal(bytes_of(target), expected)
    assert np.array_equal(bytes_of(neighbour), kept)
