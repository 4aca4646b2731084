"""Cache. Spec 3.8."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

from llm_datadist.cache import Cache
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.testing.cluster import addrs_of, make_array
from llm_datadist.types import CacheDesc, DataType, LLMRole, Placement

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

HOST_DESC = CacheDesc(2, [4, 8], DataType.DT_FLOAT16, Placement.HOST)
DEVICE_DESC = CacheDesc(2, [4, 8], DataType.DT_FLOAT16)


def make_cache(cache_id: Any = 3) -> Cache:
    return Cache(cache_id, DEVICE_DESC, [16, 32], None, is_registered=True, is_blocks_cache=True)


@pytest.mark.shows("cache")
def test_a_cache_keeps_what_it_was_given() -> None:
    cache = make_cache()
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache) == (3, [16, 32], True)
    assert cache.cache_desc is DEVICE_DESC


@pytest.mark.shows("cache")
@pytest.mark.parametrize(("cache_id", "error"), [("3", TypeError), (2**63, ValueError)])
def test_the_id_of_a_cache_is_an_int64(cache_id: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="cache_id"):
        make_cache(cache_id)


@pytest.mark.shows("cache")
def test_a_cache_prints_the_number_of_its_addresses() -> None:
    text = "Cache(cache_id = 3, device_tensor_addrs = 2, is_blocks_cache = True)"
    assert (str(make_cache()), repr(make_cache())) == (text, text)


@pytest.mark.shows("cache")
@pytest.mark.parametrize("field", ["cache_id", "cache_desc", "tensor_addrs", "is_blocks_cache"])
def test_a_cache_cannot_be_changed_from_outside(field: str) -> None:
    with pytest.raises(AttributeError):
        setattr(make_cache(), field, 1)


def test_equal_caches_are_different_objects_of_a_set() -> None:
    assert len({make_cache(), make_cache()}) == 2


@pytest.mark.shows("cache.create_cpu_cache")
def test_a_cpu_cache_is_a_blocks_cache_without_an_id() -> None:
    cache = Cache.create_cpu_cache(HOST_DESC, [16, 32])
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache) == (-1, [16, 32], True)
    assert cache.cache_desc is HOST_DESC


@pytest.mark.shows("cache.create_cpu_cache")
@pytest.mark.parametrize(
    ("desc", "addrs", "text"),
    [
        (DEVICE_DESC, [16, 32], "must be HOST, got Placement.DEVICE"),
        (HOST_DESC, [16], "2 tensors need as many addrs, got 1"),
        (HOST_DESC, [], "2 tensors need as many addrs, got 0"),
    ],
)
def test_a_cpu_cache_of_another_place_or_count_is_param_invalid(
    desc: CacheDesc, addrs: list[int], text: str
) -> None:
    with pytest.raises(LLMException, match=text) as caught:
        Cache.create_cpu_cache(desc, addrs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("cache.create_cpu_cache")
@pytest.mark.parametrize("addrs", [None, (16, 32), 16, [16, "32"], [16, None], [16, True]])
def test_the_addresses_of_a_cpu_cache_are_a_list_of_ints(addrs: Any) -> None:
    with pytest.raises(TypeError, match=r"addrs.* only support"):
        Cache.create_cpu_cache(HOST_DESC, addrs)


@pytest.mark.shows("cache.create_cpu_cache")
def test_a_cpu_cache_without_a_description_is_an_attribute_error() -> None:
    none: Any = None
    with pytest.raises(AttributeError, match="cache_desc is None"):
        Cache.create_cpu_cache(none, [16, 32])


# -- with a cache manager --------------------------------------------------------------------------

ONE_PAGE = '{"memory_size": 65536}'


@pytest.mark.shows("cache")
def test_what_a_manager_hands_out_describes_itself(node: Node) -> None:
    node.start(LLMRole.PROMPT, 1)
    array = make_array((2, 4, 8), 1)
    desc = CacheDesc(2, [4, 8], DataType.DT_INT8)
    for register, is_blocks in (
        (node.manager.register_cache, False),
        (node.manager.register_blocks_cache, True),
    ):
        cache = register(desc, addrs_of(array))
        assert cache.cache_desc is desc
        assert (cache.tensor_addrs, cache.is_blocks_cache) == (addrs_of(array), is_blocks)


@pytest.mark.shows("cache")
def test_a_cache_that_nobody_holds_keeps_its_memory(node: Node) -> None:
    node.start(LLMRole.PROMPT, 1, mem_pool_cfg=ONE_PAGE)
    desc = CacheDesc(1, [4, 8], DataType.DT_INT8)
    assert node.manager.allocate_cache(desc).cache_id == 1
    gc.collect()
    with pytest.raises(LLMException) as caught:
        node.manager.allocate_cache(desc)
    assert caught.value.status_code is LLMStatusCode.LLM_OUT_OF_MEMORY


@pytest.mark.shows("cache.create_cpu_cache")
def test_blocks_are_swapped_with_a_cpu_cache_both_ways(node: Node) -> None:
    node.start(LLMRole.PROMPT, 1)
    device = node.blocks_cache(2, 4, 16, seed=1)
    host = make_array((2, 4, 16), None)
    desc = CacheDesc(2, [4, 16], DataType.DT_INT8, Placement.HOST)
    cpu_cache = Cache.create_cpu_cache(desc, addrs_of(host))
    node.manager.swap_blocks(device, cpu_cache, {0: 3, 1: 2})
    expected = make_array((2, 4, 16), None)
    expected[:, [3, 2]] = make_array((2, 4, 16), 1)[:, [0, 1]]
    assert host.tolist() == expected.tolist()
    node.manager.swap_blocks(cpu_cache, device, {3: 1})
    swapped = make_array((2, 4, 16), 1)
    swapped[:, 1] = swapped[:, 0]
    assert node.arrays[device.cache_id].tolist() == swapped.tolist()


@pytest.mark.shows("cache.create_cpu_cache")
def test_deallocating_a_cpu_cache_does_nothing(node: Node) -> None:
    node.start(LLMRole.PROMPT, 1, mem_pool_cfg=ONE_PAGE)
    before = node.datadist.pools()
    memory = make_array((2, 4, 16), 1)
    cpu_cache = Cache.create_cpu_cache(HOST_DESC, addrs_of(memory))
    for _ in range(2):
        node.manager.deallocate_blocks_cache(cpu_cache)
    assert node.datadist.pools() == before
    assert memory.tolist() == make_array((2, 4, 16), 1).tolist()
