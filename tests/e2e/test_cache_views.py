"""Views of a cache: `Cache.tensors`, `numpy()`, `torch()`, DLPack."""

from __future__ import annotations

import gc
import subprocess
import sys
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
    SHAPE,
    WHOLE_POOL,
    Pair,
    contents,
    desc_of,
    key,
    pool,
    starts,
    status_of,
)
from element_names import NAMES, numpy_name

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMException,
    LLMRole,
    Placement,
)
from llm_datadist.testing.cluster import Node, NodeProcess, addrs_of, make_array

if TYPE_CHECKING:
    from collections.abc import Callable

lone = cache_owner.lone

#: all ways to a view
VIEWS: dict[str, Callable[[Cache], object]] = {
    "numpy": lambda cache: cache.numpy(),
    "tensor": lambda cache: cache.tensors[0].numpy(),
    "dlpack": lambda cache: np.from_dlpack(cache.tensors[0]),
    "asarray": lambda cache: np.asarray(cache.tensors[0]),
}


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(params=list(VIEWS))
def view(request: pytest.FixtureRequest) -> Callable[[Cache], object]:
    return VIEWS[request.param]


# -- what they are ---------------------------------------------------------------------------------


def test_every_data_type_but_strings_is_among_those_of_the_tests() -> None:
    assert set(DataType) - set(NAMES) == {DataType.DT_STRING}


@pytest.mark.parametrize("data_type", NAMES)
def test_arrays_have_the_shape_and_type_of_the_description(lone: Node, data_type: DataType) -> None:
    cache = lone.manager.allocate_cache(CacheDesc(3, [2, 3, 4], data_type))
    assert [(each.shape, each.data_type) for each in cache.tensors] == [((2, 3, 4), data_type)] * 3
    for array, addr in zip(cache.numpy(), cache.tensor_addrs, strict=True):
        assert (array.shape, array.dtype.name) == ((2, 3, 4), numpy_name(data_type))
        assert array.flags.writeable
        assert array.ctypes.data == addr


@pytest.mark.parametrize("data_type", NAMES)
def test_tensors_of_torch_have_the_shape_and_type_of_the_description(
    lone: Node, torch: Any, data_type: DataType
) -> None:
    cache = lone.manager.allocate_blocks_cache(CacheDesc(3, [2, 3, 4], data_type))
    handed_on = [torch.from_dlpack(each) for each in cache.tensors]
    for tensors in (cache.torch(), handed_on):
        assert [each.dtype for each in tensors] == [getattr(torch, NAMES[data_type])] * 3
        assert [tuple(each.shape) for each in tensors] == [(2, 3, 4)] * 3
        assert [each.data_ptr() for each in tensors] == cache.tensor_addrs


def test_a_view_has_the_shape_that_was_allocated(lone: Node) -> None:
    desc = desc_of((1, 4, 16))
    cache = lone.manager.allocate_cache(desc)
    desc.update_dim(1, 2**40)
    assert cache.numpy()[0].shape == (4, 16)


def test_the_bits_of_bf16_are_numbers_in_torch(lone: Node, torch: Any) -> None:
    cache = lone.manager.allocate_cache(CacheDesc(1, [1, 4], DataType.DT_BF16))
    cache.numpy()[0][:] = [[0x3F80, 0xC020, 0x0000, 0x7F80]]
    numbers = [[1.0, -2.5, 0.0, float("inf")]]
    assert cache.torch()[0].tolist() == numbers
    assert torch.from_dlpack(cache.tensors[0]).tolist() == numbers


@pytest.mark.parametrize("data_type", NAMES)
def test_numpy_makes_arrays_of_tensors_and_never_objects(lone: Node, data_type: DataType) -> None:
    tensor = lone.manager.allocate_cache(CacheDesc(1, [2, 3], data_type)).tensors[0]
    array, copied = np.asarray(tensor), np.array(tensor)
    assert (array.dtype.name, array.shape) == (numpy_name(data_type), (2, 3))
    assert np.shares_memory(array, tensor.numpy())
    assert not np.shares_memory(copied, array)


def test_numpy_makes_other_types_of_tensors_but_no_numbers_of_bf16(lone: Node) -> None:
    tensor = lone.manager.allocate_cache(CacheDesc(1, [2, 3], DataType.DT_FLOAT)).tensors[0]
    tensor.numpy()[:] = 1.5
    assert np.asarray(tensor, np.float64).tolist() == [[1.5] * 3] * 2
    of_bf16 = lone.manager.allocate_cache(CacheDesc(1, [2, 3], DataType.DT_BF16)).tensors[0]
    with pytest.raises(TypeError, match="numpy has no BF16 to make float32 of"):
        np.asarray(of_bf16, np.float32)


def test_what_is_asked_for_by_dlpack_may_be_a_copy(lone: Node, torch: Any) -> None:
    cache = lone.manager.allocate_cache(CacheDesc(1, [1, 4], DataType.DT_BF16))
    cache.torch()[0][:] = 1.5
    copy = torch.from_dlpack(cache.tensors[0], copy=True)
    cache.torch()[0][:] = 2.5
    assert copy.tolist() == [[1.5] * 4]


def test_what_is_written_to_one_view_is_read_from_the_others(lone: Node, torch: Any) -> None:
    cache = lone.manager.allocate_cache(CacheDesc(2, [2, 3], DataType.DT_FLOAT))
    handed_on = [torch.from_dlpack(each) for each in cache.tensors]
    for index, array in enumerate(cache.numpy()):
        array[:] = np.arange(6).reshape(2, 3) + index
    for views in (cache.torch(), handed_on):
        assert [each[1].tolist() for each in views] == [[3, 4, 5], [4, 5, 6]]
    cache.torch()[1][0, 1] = 9
    assert handed_on[1][0, 1] == 9
    assert contents(cache.tensor_addrs[1], 8).view(np.float32).tolist() == [1, 9]


# -- and what peers see of them --------------------------------------------------------------------


@pytest.fixture
def linked(node: Node, peer: NodeProcess, path: str) -> Pair:
    """Both with a pool."""
    settings = {"transfer_path": path, "mem_pool_cfg": pool(WHOLE_POOL)}
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    node.link(port, 1)
    return Pair(node, peer)


def test_what_is_written_to_a_view_is_pulled_into_a_view_of_a_peer(linked: Pair) -> None:
    linked.owner.call(allocate_by_view, 5)
    cache = linked.node.manager.allocate_blocks_cache(CacheDesc(4, [3, 48], DataType.DT_UINT16))
    views = cache.numpy()
    linked.node.manager.pull_blocks(BlocksCacheKey(1), cache, [2, 0], [0, 1])
    expected = make_array(SHAPE, 5).view(np.uint16)
    for array, data in zip(views, expected, strict=True):
        assert np.array_equal(array[:2], data[[2, 0]])


def allocate_by_view(node: Node, seed: int) -> None:
    cache = node.manager.allocate_blocks_cache(desc_of(SHAPE), BlocksCacheKey(1))
    for array, data in zip(cache.numpy(), make_array(SHAPE, seed), strict=True):
        array[:] = data.view(np.int8)


# -- how long they last ----------------------------------------------------------------------------


@pytest.mark.parametrize("placement", [HOST, DEVICE], ids=str)
@pytest.mark.parametrize("is_blocks", [False, True], ids=["rows", "blocks"])
def test_a_freed_cache_has_no_views(
    node: Node, view: Callable[[Cache], object], placement: Placement, is_blocks: bool
) -> None:
    starts(node, mem_pool_cfg=pool(WHOLE_POOL), host_mem_pool_cfg=pool(WHOLE_POOL))
    cache = allocated(node, is_blocks=is_blocks, placement=placement)
    view(cache)
    deallocate(node, cache)
    with pytest.raises(LLMException, match=rf"cache_id = {cache.cache_id},.* deallocated") as error:
        view(cache)
    assert error.value.status_code is GONE


def allocated(node: Node, *, is_blocks: bool = False, placement: Placement = DEVICE) -> Cache:
    """A cache that fills a pool."""
    manager = node.manager
    allocate = manager.allocate_blocks_cache if is_blocks else manager.allocate_cache
    return allocate(desc_of((4, 2, PAGE // 2), placement))


def deallocate(node: Node, cache: Cache) -> None:
    manager = node.manager
    (manager.deallocate_blocks_cache if cache.is_blocks_cache else manager.deallocate_cache)(cache)


def used_nbytes(node: Node) -> int:
    return node.datadist.pools()[DEVICE][0].used_nbytes


def test_a_tensor_that_was_asked_for_earlier_has_no_views_either(lone: Node) -> None:
    cache = allocated(lone)
    tensor = cache.tensors[3]
    deallocate(lone, cache)
    for export in (tensor.numpy, tensor.__dlpack__):
        assert status_of(export) is GONE


def test_a_cache_that_only_its_keys_keep_has_no_views(
    lone: Node, view: Callable[[Cache], object]
) -> None:
    cache = lone.manager.allocate_cache(desc_of(SHAPE), [key(1)])
    lone.manager.deallocate_cache(cache)
    assert used_nbytes(lone) > 0
    assert status_of(view, cache) is GONE


@pytest.mark.parametrize("is_blocks", [False, True], ids=["rows", "blocks"])
def test_freed_memory_is_not_recycled_under_a_view(lone: Node, is_blocks: bool) -> None:
    cache = allocated(lone, is_blocks=is_blocks)
    views = cache.numpy()
    views[2][:] = 7
    deallocate(lone, cache)
    with pytest.raises(LLMException, match="1 freed caches are still held by arrays") as error:
        allocated(lone)
    assert error.value.status_code is NO_MEMORY
    part = views[2][1, 5:9]
    del views
    assert used_nbytes(lone) == WHOLE_POOL
    assert part.tolist() == [7] * 4
    del part
    assert used_nbytes(lone) == 0
    allocated(lone).numpy()[2][:] = 1


@pytest.mark.parametrize("last", ["pools", "allocate"])
def test_a_view_that_is_gone_does_not_keep_memory(lone: Node, last: str) -> None:
    for _ in range(3):
        cache = allocated(lone)
        views = cache.numpy() + cache.numpy()
        deallocate(lone, cache)
        del views
        if last == "pools":
            assert used_nbytes(lone) == 0
    assert allocated(lone).numpy()[0].shape == (2, PAGE // 2)


def test_a_view_that_is_gone_first_leaves_the_cache_alone(lone: Node) -> None:
    cache = allocated(lone)
    cache.numpy()
    assert status_of(allocated, lone) is NO_MEMORY
    cache.numpy()[0][:] = 3
    assert cache.numpy()[0].tolist() == [[3] * (PAGE // 2)] * 2


@pytest.mark.parametrize("is_handed_on", [False, True], ids=["torch", "dlpack"])
def test_tensors_of_torch_keep_the_memory_as_well(
    lone: Node, torch: Any, is_handed_on: bool
) -> None:
    cache = allocated(lone)
    tensor = torch.from_dlpack(cache.tensors[1]) if is_handed_on else cache.torch()[1]
    part = tensor[1]
    part[:] = 5
    del tensor
    deallocate(lone, cache)
    assert status_of(allocated, lone) is NO_MEMORY
    assert set(part.tolist()) == {5}
    del part
    assert used_nbytes(lone) == 0


def test_a_pull_does_not_reach_what_only_a_view_keeps(linked: Pair) -> None:
    assert linked.owner.call(hold_a_view_of_what_is_freed) == 0
    cache = linked.node.manager.allocate_blocks_cache(desc_of(SHAPE))
    pull = linked.node.manager.pull_blocks
    assert status_of(pull, BlocksCacheKey(1), cache, [0], [0]) is GONE


def hold_a_view_of_what_is_freed(node: Node) -> int:
    cache = node.manager.allocate_blocks_cache(desc_of(SHAPE), BlocksCacheKey(1))
    node.arrays[cache.cache_id] = cache.numpy()[0].view(np.uint8)
    node.manager.deallocate_blocks_cache(cache)
    return len(cache.tensor_addrs)


def test_a_view_outlives_a_finalize(peer: NodeProcess) -> None:
    assert peer.call(read_after_finalize) == ([7] * PAGE, GONE)


def read_after_finalize(node: Node) -> tuple[list[int], object]:
    """In another process, which it would end if the memory were gone."""
    starts(node, mem_pool_cfg=pool(PAGE))
    cache = node.manager.allocate_cache(desc_of((1, 1, PAGE)))
    array = cache.numpy()[0]
    array[:] = 7
    node.stop()
    gc.collect()
    return array[0].tolist(), status_of(cache.numpy)


def test_a_cache_of_before_a_finalize_has_no_views(lone: Node) -> None:
    old = allocated(lone)
    lone.stop()
    starts(lone, mem_pool_cfg=pool(WHOLE_POOL))
    assert allocated(lone).cache_id == old.cache_id
    assert status_of(old.numpy) is GONE


class Knot:
    """Holds views and itself: only the cyclic collector lets go of it."""

    def __init__(self, cache: Cache) -> None:
        self.held = self, cache.numpy()


def test_a_collection_in_the_midst_of_a_call_does_not_lock_up(lone: Node) -> None:
    before = gc.get_threshold()
    gc.disable()
    try:
        for num_objects in range(1, 100):  # it strikes after so many: anywhere in the calls
            cache = lone.manager.allocate_cache(desc_of((2, 1, 8)))
            Knot(cache)
            lone.manager.deallocate_cache(cache)
            gc.set_threshold(num_objects)
            gc.enable()
            lone.manager.deallocate_cache(lone.manager.allocate_cache(desc_of((1, 1, 8))))
            gc.disable()
            gc.collect(0)
    finally:
        gc.set_threshold(*before)
        gc.enable()
    assert used_nbytes(lone) == 0


EXIT = """
from llm_datadist import CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole
config = LLMConfig()
config.enable_cache_manager = True
config.mem_pool_cfg = '{"memory_size": 1000000}'
datadist = LLMDataDist(LLMRole.PROMPT, 1)
datadist.init(config.generate_options())
cache = datadist.cache_manager.allocate_cache(CacheDesc(2, [1, 8], DataType.DT_BF16))
views = cache.numpy(), cache.tensors
datadist.cache_manager.deallocate_cache(cache)
import sys
assert "torch" not in sys.modules
"""


def test_views_that_are_left_do_not_disturb_the_exit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


# -- what has none ---------------------------------------------------------------------------------


def test_strings_have_no_views(lone: Node, view: Callable[[Cache], object]) -> None:
    cache = lone.manager.allocate_cache(CacheDesc(1, [2], DataType.DT_STRING))
    with pytest.raises(LLMException, match="DT_STRING") as error:
        view(cache)
    assert error.value.status_code is INVALID


def test_memory_that_is_known_by_its_address_has_no_views(
    lone: Node, view: Callable[[Cache], object]
) -> None:
    array = make_array(SHAPE, 1)
    registered = lone.manager.register_cache(desc_of(SHAPE), addrs_of(array))
    on_host = Cache.create_cpu_cache(desc_of(SHAPE, HOST), addrs_of(array))
    for cache, text in ((registered, "registered by address"), (on_host, "is a cpu cache")):
        with pytest.raises(LLMException, match=text) as error:
            view(cache)
        assert error.value.status_code is INVALID
