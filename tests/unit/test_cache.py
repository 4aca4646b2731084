"""Cache. Spec 3.8."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist.cache import Cache
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.types import CacheDesc, DataType, Placement

HOST_DESC = CacheDesc(2, [4, 8], DataType.DT_FLOAT16, Placement.HOST)
DEVICE_DESC = CacheDesc(2, [4, 8], DataType.DT_FLOAT16)


def make_cache(cache_id: Any = 3) -> Cache:
    return Cache(cache_id, DEVICE_DESC, [16, 32], None, is_registered=True, is_blocks_cache=True)


def test_a_cache_keeps_what_it_was_given() -> None:
    cache = make_cache()
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache) == (3, [16, 32], True)
    assert cache.cache_desc is DEVICE_DESC


@pytest.mark.parametrize(("cache_id", "error"), [("3", TypeError), (2**63, ValueError)])
def test_the_id_of_a_cache_is_an_int64(cache_id: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="cache_id"):
        make_cache(cache_id)


def test_a_cache_prints_the_number_of_its_addresses() -> None:
    text = "Cache(cache_id = 3, device_tensor_addrs = 2, is_blocks_cache = True)"
    assert (str(make_cache()), repr(make_cache())) == (text, text)


@pytest.mark.parametrize("field", ["cache_id", "cache_desc", "tensor_addrs", "is_blocks_cache"])
def test_a_cache_cannot_be_changed_from_outside(field: str) -> None:
    with pytest.raises(AttributeError):
        setattr(make_cache(), field, 1)


def test_equal_caches_are_different_objects_of_a_set() -> None:
    assert len({make_cache(), make_cache()}) == 2


def test_a_cpu_cache_is_a_blocks_cache_without_an_id() -> None:
    cache = Cache.create_cpu_cache(HOST_DESC, [16, 32])
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache) == (-1, [16, 32], True)
    assert cache.cache_desc is HOST_DESC


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


@pytest.mark.parametrize("addrs", [None, (16, 32), 16, [16, "32"], [16, None], [16, True]])
def test_the_addresses_of_a_cpu_cache_are_a_list_of_ints(addrs: Any) -> None:
    with pytest.raises(TypeError, match=r"addrs.* only support"):
        Cache.create_cpu_cache(HOST_DESC, addrs)


def test_a_cpu_cache_without_a_description_is_an_attribute_error() -> None:
    none: Any = None
    with pytest.raises(AttributeError, match="cache_desc is None"):
        Cache.create_cpu_cache(none, [16, 32])
