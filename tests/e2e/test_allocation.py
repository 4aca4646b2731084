"""Caches in the library's own memory: pools, keys, references, and what pulls use up. Spec 6.1-6.7.

The owner (cluster 1) is in another process; the puller (cluster 2) is here. Memory that was freed
shows by being allocated again: the owner's pool has room for exactly one cache of the tests.
"""

from __future__ import annotations

import ctypes
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PAGE = 65536
NO_ID = 2**64 - 1
SUCCESS = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
GONE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NO_MEMORY = LLMStatusCode.LLM_OUT_OF_MEMORY
NOT_ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
HOST, DEVICE = Placement.HOST, Placement.DEVICE
PLACEHOLDER = CacheKey(0, NO_ID)
#: rows of 96 bytes, four tensors: a page for each
SHAPE = (4, 3, 96)
WHOLE_POOL = 4 * PAGE


def pool(nbytes: int, **fields: int) -> str:
    return json.dumps({"memory_size": nbytes, **fields})


def desc_of(
    shape: tuple[int, ...], placement: Placement = DEVICE, data_type: DataType = DataType.DT_INT8
) -> CacheDesc:
    num_tensors, *dims = shape
    return CacheDesc(num_tensors, dims, data_type, placement)


def contents(addr: int, nbytes: int) -> Bytes:
    """The memory at an address: no copy."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(addr))


def view(cache: Cache) -> list[Bytes]:
    return [contents(addr, cache.cache_desc.size) for addr in cache.tensor_addrs]


def bytes_of(cache: Cache) -> Bytes:
    return np.stack(view(cache)).reshape(cache.cache_desc.num_tensors, *cache.cache_desc.shape)


def fill(cache: Cache, seed: int) -> None:
    shape = (cache.cache_desc.num_tensors, cache.cache_desc.size)
    for tensor, data in zip(view(cache), make_array(shape, seed), strict=True):
        tensor[:] = data


def status_of(call: Callable[..., object], *args: Any, **kwargs: Any) -> LLMStatusCode:
    try:
        call(*args, **kwargs)
    except LLMException as error:
        return error.status_code
    return SUCCESS


# -- run by the owner ------------------------------------------------------------------------------


def allocate(
    node: Node,
    keys: Sequence[CacheKey] = (),
    seed: int = 1,
    shape: tuple[int, ...] = SHAPE,
    placement: Placement = DEVICE,
) -> int:
    cache = node.manager.allocate_cache(desc_of(shape, placement), keys)
    fill(cache, seed)
    node.caches[cache.cache_id] = cache
    return cache.cache_id


def allocate_blocks(
    node: Node,
    key: BlocksCacheKey | None = None,
    seed: int = 1,
    shape: tuple[int, ...] = SHAPE,
    placement: Placement = DEVICE,
) -> int:
    cache = node.manager.allocate_blocks_cache(desc_of(shape, placement), key)
    fill(cache, seed)
    node.caches[cache.cache_id] = cache
    return cache.cache_id


def allocate_and_deallocate(node: Node, keys: Sequence[CacheKey], seed: int) -> int:
    cache = node.manager.allocate_cache(desc_of(SHAPE), keys)
    fill(cache, seed)
    node.manager.deallocate_cache(cache)
    return cache.cache_id


def deallocate(node: Node, cache_id: int) -> None:
    cache = node.caches[cache_id]
    if cache.is_blocks_cache:
        node.manager.deallocate_blocks_cache(cache)
    else:
        node.manager.deallocate_cache(cache)


def remove_key(node: Node, key: CacheKey) -> None:
    node.manager.remove_cache_key(key)


def register(node: Node, keys: Sequence[CacheKey]) -> int:
    return node.rows_cache(*SHAPE, seed=1, keys=keys).cache_id


def unregister(node: Node, cache_id: int) -> None:
    node.manager.unregister_cache(cache_id)


def is_all_free(node: Node) -> bool:
    """Whether the whole pool can be allocated; it is given back at once."""
    with suppress(LLMException):
        cache = node.manager.allocate_blocks_cache(desc_of((1, 1, WHOLE_POOL)))
        node.manager.deallocate_blocks_cache(cache)
        return True
    return False


# -- the pair --------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A puller here, an owner elsewhere with a pool for one cache, and its id."""

    node: Node
    owner: NodeProcess
    results: list[Cache] = field(default_factory=list)

    def pull(self, key: CacheKey | CacheKeyByIdAndIndex, **kwargs: Any) -> Bytes:
        """A row of the owner's, which a pull into a row of ours between two others brings."""
        cache = self.node.rows_cache(SHAPE[0], 3, SHAPE[2])
        array = self.node.arrays[cache.cache_id]
        try:
            self.node.manager.pull_cache(key, cache, 1, **kwargs)
        finally:
            assert not array[:, 0].any()
            assert not array[:, 2].any()
            self.node.manager.unregister_cache(cache.cache_id)
        return array[:, 1]

    def refused(self, key: CacheKey | CacheKeyByIdAndIndex, **kwargs: Any) -> LLMStatusCode:
        return status_of(self.pull, key, **kwargs)


def row(seed: int, index: int) -> Bytes:
    return make_array((SHAPE[0], SHAPE[1] * SHAPE[2]), seed).reshape(SHAPE)[:, index]


def make_pair(node: Node, owner: NodeProcess, path: str, *, is_accessible: bool) -> Pair:
    settings = {"enable_remote_cache_accessible": is_accessible, "transfer_path": path}
    port = owner.call(
        Node.start,
        LLMRole.PROMPT,
        1,
        listen_ip_info="127.0.0.1:0",
        mem_pool_cfg=pool(WHOLE_POOL),
        **settings,
    )
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) is SUCCESS
    return Pair(node, owner)


@pytest.fixture
def pair(node: Node, peer: NodeProcess, path: str) -> Pair:
    """In two-sided mode."""
    return make_pair(node, peer, path, is_accessible=False)


@pytest.fixture
def accessible(node: Node, peer: NodeProcess, path: str) -> Pair:
    """In remote-accessible mode."""
    return make_pair(node, peer, path, is_accessible=True)


@pytest.fixture
def either(node: Node, peer: NodeProcess, path: str, is_accessible: bool) -> Pair:
    return make_pair(node, peer, path, is_accessible=is_accessible)


def key(req_id: int, model_id: int = 0) -> CacheKey:
    return CacheKey(1, req_id, model_id)


def prefix(prefix_id: int, model_id: int = 0) -> CacheKey:
    return CacheKey(1, NO_ID, model_id, prefix_id)


def by_id(cache_id: int, index: int = 0) -> CacheKeyByIdAndIndex:
    return CacheKeyByIdAndIndex(1, cache_id, index)


# -- pools -----------------------------------------------------------------------------------------


def starts(node: Node, **settings: Any) -> Node:
    node.start(LLMRole.PROMPT, 1, **settings)
    return node


def test_a_pool_serves_exactly_what_fits(node: Node) -> None:
    manager = starts(node, mem_pool_cfg=pool(262144)).manager
    cache = manager.allocate_cache(desc_of((4, 1, PAGE)))
    assert len({addr - min(cache.tensor_addrs) for addr in cache.tensor_addrs}) == 4
    assert max(cache.tensor_addrs) - min(cache.tensor_addrs) == 3 * PAGE
    assert status_of(manager.allocate_cache, desc_of((1, 1, 1))) is NO_MEMORY
    assert status_of(manager.allocate_blocks_cache, desc_of((1, 1, 1))) is NO_MEMORY
    manager.deallocate_cache(cache)
    assert status_of(manager.allocate_cache, desc_of((4, 1, PAGE))) is SUCCESS


def test_each_tensor_takes_whole_pages(node: Node) -> None:
    manager = starts(node, mem_pool_cfg=pool(65536)).manager
    assert status_of(manager.allocate_cache, desc_of((2, 1, 2048))) is NO_MEMORY
    assert status_of(manager.allocate_cache, desc_of((1, 1, 2048))) is SUCCESS


def test_small_pages_hold_more_small_tensors(node: Node) -> None:
    manager = starts(node, mem_pool_cfg=pool(65536, page_shift=10)).manager
    assert len(manager.allocate_cache(desc_of((64, 1, 1024))).tensor_addrs) == 64
    assert status_of(manager.allocate_cache, desc_of((1, 1, 1))) is NO_MEMORY


def test_a_failing_allocation_gives_its_pieces_back(node: Node) -> None:
    manager = starts(node, mem_pool_cfg=pool(WHOLE_POOL)).manager
    for _ in range(3):
        assert status_of(manager.allocate_cache, desc_of((5, 1, PAGE))) is NO_MEMORY
        assert status_of(manager.allocate_cache, desc_of((2, 1, 3 * PAGE))) is NO_MEMORY
    assert is_all_free(node)


def test_the_data_type_counts(node: Node) -> None:
    manager = starts(node, mem_pool_cfg=pool(WHOLE_POOL)).manager
    whole = desc_of((1, 2, WHOLE_POOL // 8), data_type=DataType.DT_FLOAT)
    assert whole.size == WHOLE_POOL
    manager.deallocate_cache(manager.allocate_cache(whole))
    too_much = desc_of((1, 2, WHOLE_POOL // 8 + 1), data_type=DataType.DT_FLOAT)
    assert status_of(manager.allocate_cache, too_much) is NO_MEMORY


def test_device_and_host_have_pools_of_their_own(node: Node) -> None:
    starts(node, mem_pool_cfg=pool(PAGE), host_mem_pool_cfg=pool(2 * PAGE))
    device = node.manager.allocate_cache(desc_of((1, 1, PAGE)))
    host = node.manager.allocate_cache(desc_of((2, 1, PAGE), HOST))
    assert status_of(node.manager.allocate_cache, desc_of((1, 1, 1))) is NO_MEMORY
    assert status_of(node.manager.allocate_cache, desc_of((1, 1, 1), HOST)) is NO_MEMORY
    node.manager.deallocate_cache(host)
    assert status_of(node.manager.allocate_cache, desc_of((1, 1, 1))) is NO_MEMORY
    node.manager.deallocate_cache(device)
    assert status_of(node.manager.allocate_blocks_cache, desc_of((2, 1, 1), HOST)) is SUCCESS
    assert status_of(node.manager.allocate_blocks_cache, desc_of((1, 1, 1))) is SUCCESS


@pytest.mark.parametrize(
    ("option", "placement"), [("mem_pool_cfg", HOST), ("host_mem_pool_cfg", DEVICE)]
)
def test_the_other_pool_does_not_do(node: Node, option: str, placement: Placement) -> None:
    manager = starts(node, **{option: pool(WHOLE_POOL)}).manager
    desc = desc_of((1, 1, 1), placement)
    assert status_of(manager.allocate_cache, desc) is INVALID
    assert status_of(manager.allocate_blocks_cache, desc) is INVALID


def test_without_any_pool_nothing_is_allocated(node: Node) -> None:
    manager = starts(node).manager
    assert status_of(manager.allocate_cache, desc_of((1, 1, 1))) is INVALID
    assert status_of(manager.allocate_blocks_cache, desc_of((1, 1, 1))) is INVALID
    rows, blocks = node.rows_cache(), node.blocks_cache()
    assert status_of(manager.deallocate_cache, rows) is NOT_ENABLED
    assert status_of(manager.deallocate_blocks_cache, blocks) is NOT_ENABLED
    cpu_cache = Cache.create_cpu_cache(desc_of((1, 1, 1), HOST), [4096])
    assert status_of(manager.deallocate_blocks_cache, cpu_cache) is NOT_ENABLED
    assert status_of(manager.remove_cache_key, key(1)) is NOT_ENABLED
    assert status_of(manager.remove_cache_key, PLACEHOLDER) is NOT_ENABLED


def test_a_buffer_pool_has_classes_and_a_rest(node: Node) -> None:
    mib = 2 * 1024 * 1024
    classes = [{"total_size": mib, "blk_size": 256, "max_buf_size": 8192}]
    config = json.dumps({"buf_cfg": classes, "buf_pool_size": mib + 2 * PAGE})
    manager = starts(node, buf_pool_cfg=config).manager
    small = manager.allocate_cache(desc_of((mib // 256, 1, 256)))
    assert len(set(small.tensor_addrs)) == mib // 256
    large = manager.allocate_blocks_cache(desc_of((1, 1, PAGE)))
    spilled = manager.allocate_cache(desc_of((1, 1, 256)))
    assert status_of(manager.allocate_cache, desc_of((1, 1, 256))) is NO_MEMORY
    for cache in (small, spilled):
        manager.deallocate_cache(cache)
    manager.deallocate_blocks_cache(large)
    assert status_of(manager.allocate_cache, desc_of((1, 1, 2 * PAGE))) is SUCCESS
    assert status_of(manager.allocate_cache, desc_of((256, 1, 8192))) is SUCCESS
    assert status_of(manager.allocate_cache, desc_of((1, 1, 1))) is NO_MEMORY


def resident_nbytes() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) * 1024


def test_a_large_pool_takes_no_memory_until_it_is_used(node: Node) -> None:
    before = resident_nbytes()
    begun = time.monotonic()
    starts(node, mem_pool_cfg=pool(18737418240))
    assert time.monotonic() - begun < 2
    cache = node.manager.allocate_cache(desc_of((2, 1, 8 * 1024**3)))
    for tensor in view(cache):
        tensor[[0, -1]] = 1, 2
        assert tensor[[0, -1]].tolist() == [1, 2]
    assert resident_nbytes() - before < 64 * 1024 * 1024
    node.manager.deallocate_cache(cache)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((0, 1, 1), INVALID),
        ((1, 0, 1), INVALID),
        ((1, 1, -1), INVALID),
        ((1, *[1] * 31), SUCCESS),
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


# -- keys ------------------------------------------------------------------------------------------


@pytest.fixture
def lone(node: Node) -> Node:
    """A node with a pool and no peer."""
    return starts(node, mem_pool_cfg=pool(WHOLE_POOL))


def test_lack_of_memory_comes_before_wrong_keys(lone: Node) -> None:
    too_many = [key(1), key(2)]
    assert status_of(allocate, lone, too_many, shape=(5, 1, PAGE)) is NO_MEMORY
    assert status_of(allocate, lone, too_many, shape=(4, 1, PAGE)) is INVALID
    assert is_all_free(lone)


@pytest.mark.parametrize("extra", [key(9), PLACEHOLDER], ids=["key", "placeholder"])
def test_more_keys_than_rows_are_refused(lone: Node, extra: CacheKey) -> None:
    keys = [key(1), key(2), key(3), extra]
    assert status_of(allocate, lone, keys) is INVALID
    assert is_all_free(lone)
    assert status_of(allocate, lone, keys[:3]) is SUCCESS


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


def test_a_key_of_a_registered_cache_is_bound_too(lone: Node) -> None:
    cache_id = register(lone, [key(1)])
    assert status_of(allocate, lone, [key(1)], shape=(1, 1, 8)) is INVALID
    remove_key(lone, key(1))
    assert status_of(allocate, lone, [key(1)], shape=(1, 1, 8)) is INVALID
    lone.manager.unregister_cache(cache_id)
    assert status_of(allocate, lone, [key(1)], shape=(1, 1, 8)) is SUCCESS


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


def test_the_description_is_not_marked_as_one_of_blocks(lone: Node) -> None:
    desc = desc_of((1, 2, 8))
    blocks = lone.manager.allocate_blocks_cache(desc)
    rows = lone.manager.allocate_cache(desc, [key(1), key(2)])
    assert (blocks.is_blocks_cache, rows.is_blocks_cache) == (True, False)
    assert rows.cache_desc is desc
    lone.manager.copy_cache(rows, rows, 1, 0)
    lone.manager.copy_blocks(blocks, {0: [1]})


def test_of_a_key_given_twice_the_last_row_counts(pair: Pair) -> None:
    pair.owner.call(allocate, [key(1), key(2), key(1)], 3)
    assert np.array_equal(pair.pull(key(1)), row(3, 2))
    assert pair.refused(key(1)) is GONE
    assert np.array_equal(pair.pull(key(2)), row(3, 1))


def test_any_number_of_placeholders_leaves_rows_without_a_key(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate, [PLACEHOLDER, PLACEHOLDER, key(1)], 3)
    assert np.array_equal(pair.pull(key(1)), row(3, 2))
    for index in range(3):
        assert np.array_equal(pair.pull(by_id(cache_id, index)), row(3, index))


def test_ids_count_allocated_and_registered_caches_together(lone: Node) -> None:
    ids = [allocate(lone, shape=(1, 1, 8)), lone.rows_cache().cache_id]
    ids.append(allocate_blocks(lone, shape=(1, 1, 8)))
    deallocate(lone, ids[2])
    ids.append(allocate(lone, shape=(1, 1, 8)))
    assert ids == [1, 2, 3, 4]


# -- references ------------------------------------------------------------------------------------


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


def test_deallocated_at_once_the_key_keeps_the_memory_until_it_is_pulled(pair: Pair) -> None:
    for seed in range(1, 4):
        pair.owner.call(allocate_and_deallocate, [key(1)], seed)
        assert not pair.owner.call(is_all_free)
        assert np.array_equal(pair.pull(key(1)), row(seed, 0))
        assert pair.owner.call(is_all_free)


def test_a_deallocated_cache_that_a_key_holds_can_still_be_pulled_by_id(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate_and_deallocate, [PLACEHOLDER, key(1)], 5)
    assert np.array_equal(pair.pull(by_id(cache_id, 0)), row(5, 0))
    assert np.array_equal(pair.pull(by_id(cache_id, 2)), row(5, 2))
    assert not pair.owner.call(is_all_free)
    assert np.array_equal(pair.pull(by_id(cache_id, 1)), row(5, 1))
    assert pair.owner.call(is_all_free)


def test_while_the_id_holds_it_a_cache_without_keys_stays(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate, [key(1)], 5)
    assert np.array_equal(pair.pull(key(1)), row(5, 0))
    assert np.array_equal(pair.pull(by_id(cache_id, 0)), row(5, 0))
    assert not pair.owner.call(is_all_free)
    pair.owner.call(deallocate, cache_id)
    assert pair.owner.call(is_all_free)


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


# -- deallocating ----------------------------------------------------------------------------------


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


def test_each_kind_has_its_call(lone: Node) -> None:
    rows = lone.manager.allocate_cache(desc_of((2, 1, PAGE)))
    blocks = lone.manager.allocate_blocks_cache(desc_of((2, 1, PAGE)))
    assert status_of(lone.manager.deallocate_blocks_cache, rows) is INVALID
    assert status_of(lone.manager.deallocate_cache, blocks) is INVALID
    assert (len(rows.tensor_addrs), len(blocks.tensor_addrs)) == (2, 2)
    assert status_of(allocate, lone, shape=(1, 1, 1)) is NO_MEMORY


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


def test_unknown_keys_and_placeholders_are_removed_without_effect(lone: Node) -> None:
    allocate(lone, [key(1)], shape=(4, 1, PAGE))
    for each in (key(2), key(1, 1), prefix(1), PLACEHOLDER, CacheKey(1, 1, prefix_id=1)):
        remove_key(lone, each)
    assert status_of(allocate, lone, [key(1)], shape=(1, 1, 1)) is NO_MEMORY
    deallocate(lone, 1)
    assert not is_all_free(lone)
    remove_key(lone, key(1))
    assert is_all_free(lone)


def test_an_allocated_cache_cannot_be_unregistered(pair: Pair) -> None:
    cache_id = pair.owner.call(allocate, [key(1)], 5)
    pair.owner.call(unregister, cache_id)
    assert np.array_equal(pair.pull(by_id(cache_id, 1)), row(5, 1))
    assert np.array_equal(pair.pull(key(1)), row(5, 0))
    assert not pair.owner.call(is_all_free)
    pair.owner.call(deallocate, cache_id)
    assert pair.owner.call(is_all_free)


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


def test_finalize_frees_everything_and_ids_begin_anew(lone: Node) -> None:
    manager = lone.manager
    cache = manager.allocate_cache(desc_of((4, 1, PAGE)), [key(1)])
    lone.stop()
    assert status_of(manager.deallocate_cache, cache) is INVALID
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
    is_enabled = DEVICE in (theirs, ours)
    status = status_of(node.manager.pull_cache, key(2), target, 2)
    assert status is (SUCCESS if is_enabled else NOT_ENABLED)
    if is_enabled:
        expected[:, 2] = row(5, 1)
    assert np.array_equal(bytes_of(target), expected)
    assert np.array_equal(bytes_of(neighbour), kept)
