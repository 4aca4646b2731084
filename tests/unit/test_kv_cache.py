"""KvCache: over memory of the caller's, and freed when nobody holds it. Spec 3.8."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from llm_datadist.datadist import LLMDataDist
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.kv_cache import KvCache
from llm_datadist.types import CacheDesc, DataType, LLMRole, Placement

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.kv_cache_manager import KvCacheManager

HOST_DESC = CacheDesc(2, [4, 8], DataType.DT_FLOAT16, Placement.HOST)
DEVICE_DESC = CacheDesc(2, [4, 8], DataType.DT_FLOAT16)


@pytest.mark.shows("kv_cache.create_cpu_cache")
@pytest.mark.parametrize("addrs", [[16, 32], [[16, 32]]])
def test_a_cpu_cache_takes_its_addresses_flat_or_for_the_one_device(addrs: Any) -> None:
    cache = KvCache.create_cpu_cache(HOST_DESC, addrs)
    assert cache.per_device_tensor_addrs == [[16, 32]]
    assert cache.cache_id == -1
    assert cache.cache_desc is HOST_DESC


def test_a_cache_prints_the_number_of_its_addresses() -> None:
    text = "KvCache(cache_id = -1, device_tensor_addrs = 2, is_blocks_cache = True)"
    cache = KvCache.create_cpu_cache(HOST_DESC, [16, 32])
    assert (str(cache), repr(cache)) == (text, text)


@pytest.mark.parametrize("field", ["cache_id", "cache_desc", "per_device_tensor_addrs"])
def test_a_cache_cannot_be_changed_from_outside(field: str) -> None:
    with pytest.raises(AttributeError):
        setattr(KvCache.create_cpu_cache(HOST_DESC, [16, 32]), field, 1)


@pytest.mark.shows("kv_cache.create_cpu_cache")
@pytest.mark.parametrize(
    ("desc", "addrs", "text"),
    [
        (HOST_DESC, [16, [32]], "should be consistent"),
        (HOST_DESC, [[16], 32], "should be consistent"),
        (HOST_DESC, [], "addrs is empty"),
        (HOST_DESC, [[]], "addrs is empty"),
        (HOST_DESC, [[16, 32], []], "addrs is empty"),
        (HOST_DESC, [[16, 32], [48]], "2 tensors need as many addrs, got 1"),
        (HOST_DESC, [16], "2 tensors need as many addrs, got 1"),
        (HOST_DESC, [[16, 32, 48]], "2 tensors need as many addrs, got 3"),
        (DEVICE_DESC, [16, 32], "must be HOST, got Placement.DEVICE"),
    ],
)
def test_addresses_that_do_not_fit_are_refused(desc: CacheDesc, addrs: Any, text: str) -> None:
    with pytest.raises(LLMException, match=text) as error:
        KvCache.create_cpu_cache(desc, addrs)
    assert error.value.status_code == LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("kv_cache.create_cpu_cache")
@pytest.mark.parametrize("addrs", [None, (16, 32), ["16", "32"], [[16, "32"]], [True, False], 16])
def test_addresses_of_a_wrong_type_are_refused(addrs: Any) -> None:
    with pytest.raises(TypeError, match="addrs"):
        KvCache.create_cpu_cache(HOST_DESC, addrs)


@pytest.mark.shows("kv_cache.create_cpu_cache")
def test_a_description_must_be_one() -> None:
    with pytest.raises(AttributeError, match="cache_desc is None"):
        KvCache.create_cpu_cache(None, [16])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cache_desc"):
        KvCache.create_cpu_cache([4, 8], [16])  # type: ignore[arg-type]


# -- freed when nobody holds it --------------------------------------------------------------------

PAGE = 65536
ONE_PAGE = CacheDesc(1, [1, PAGE], DataType.DT_UINT8)
TWO_PAGES = CacheDesc(2, [1, PAGE], DataType.DT_UINT8)


@pytest.fixture
def manager() -> Iterator[KvCacheManager]:
    """One with memory for two pages."""
    datadist = LLMDataDist(LLMRole.PROMPT, 1)
    datadist.init({"ge.flowGraphMemMaxSize": str(2 * PAGE)})
    yield datadist.kv_cache_manager
    datadist.finalize()


def assert_full(manager: KvCacheManager) -> None:
    with pytest.raises(LLMException) as error:
        manager.allocate_cache(ONE_PAGE)
    assert error.value.status_code == LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY


@pytest.mark.shows("kv_cache.lifetime")
@pytest.mark.parametrize("kind", ["allocate_cache", "allocate_blocks_cache"])
def test_what_nobody_holds_is_there_for_the_next_cache(manager: KvCacheManager, kind: str) -> None:
    allocate = getattr(manager, kind)
    ids = [allocate(TWO_PAGES).cache_id for _ in range(1000)]
    assert ids == list(range(1, 1001))


@pytest.mark.shows("kv_cache.lifetime")
def test_what_was_deallocated_is_not_freed_again(manager: KvCacheManager) -> None:
    first = manager.allocate_cache(ONE_PAGE)
    manager.deallocate_cache(first)
    second = manager.allocate_cache(TWO_PAGES)
    del first
    assert_full(manager)
    assert second.per_device_tensor_addrs != [[]]


def test_an_array_keeps_the_cache(manager: KvCacheManager) -> None:
    array = manager.get_cache_tensors(manager.allocate_cache(TWO_PAGES))[0].numpy()
    row = array[0]
    del array
    gc.collect()
    assert_full(manager)
    row[:] = 7
    assert row.tolist() == [7] * PAGE
    del row
    manager.allocate_cache(TWO_PAGES)


def test_an_array_keeps_the_memory_of_a_deallocated_cache(manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(TWO_PAGES)
    array = manager.get_cache_tensors(cache)[0].numpy()
    array[:] = 7
    manager.deallocate_cache(cache)
    assert_full(manager)
    assert (array == 7).all()
    del array
    manager.allocate_cache(TWO_PAGES)


class Knot:
    """Holds a cache and itself: only the cyclic collector lets go of it."""

    def __init__(self, cache: KvCache) -> None:
        self.held = self, cache


def test_a_collection_in_the_midst_of_a_call_does_not_lock_up(manager: KvCacheManager) -> None:
    before = gc.get_threshold()
    gc.disable()
    try:
        for num_objects in range(1, 150):  # it strikes after so many: anywhere in the calls
            manager.deallocate_cache(manager.allocate_blocks_cache(TWO_PAGES))
            Knot(manager.allocate_cache(ONE_PAGE))
            gc.set_threshold(num_objects)
            gc.enable()
            manager.deallocate_cache(manager.allocate_cache(ONE_PAGE))
            gc.disable()
            gc.collect(0)
    finally:
        gc.set_threshold(*before)
        gc.enable()
    manager.allocate_cache(TWO_PAGES)


EXIT = """
import gc
from llm_datadist import CacheDesc, DataType, LLMDataDist, LLMRole
datadist = LLMDataDist(LLMRole.PROMPT, 1)
datadist.init({"ge.flowGraphMemMaxSize": "1000000"})
desc = CacheDesc(2, [1, 8], DataType.DT_INT8)
caches = [datadist.kv_cache_manager.allocate_cache(desc) for _ in range(3)]
array = datadist.kv_cache_manager.get_cache_tensors(caches[0])[0].numpy()
caches.append(caches)
gc.disable()
"""


@pytest.mark.parametrize("last", ["", "datadist.finalize()", "del caches", "del datadist, desc"])
def test_caches_that_are_left_do_not_disturb_the_exit(last: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT + last], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
