"""Pools: what they hold, and when they have no room. Spec 6.3, 8."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
from cache_owner import (
    DEVICE,
    HOST,
    INVALID,
    NO_MEMORY,
    NOT_ENABLED,
    PAGE,
    PLACEHOLDER,
    SUCCESS,
    WHOLE_POOL,
    desc_of,
    fill,
    is_all_free,
    key,
    pool,
    starts,
    status_of,
    view,
)

from llm_datadist import (
    Cache,
    DataType,
    Placement,
)
from llm_datadist.testing.cluster import Node, make_array


@pytest.mark.shows("pool.exhausted", "error.33", "cm.allocate_cache")
def test_a_pool_serves_exactly_what_fits(node: Node) -> None:
    manager = starts(node, mem_pool_cfg=pool(262144)).manager
    cache = manager.allocate_cache(desc_of((4, 1, PAGE)))
    first = min(cache.tensor_addrs)
    assert sorted(addr - first for addr in cache.tensor_addrs) == [0, PAGE, 2 * PAGE, 3 * PAGE]
    assert status_of(manager.allocate_cache, desc_of((1, 1, 1))) is NO_MEMORY
    assert status_of(manager.allocate_blocks_cache, desc_of((1, 1, 1))) is NO_MEMORY
    manager.deallocate_cache(cache)
    assert status_of(manager.allocate_cache, desc_of((4, 1, PAGE))) is SUCCESS


@pytest.mark.shows("cm.allocate_cache")
def test_tensors_begin_at_pages_whatever_their_size(node: Node) -> None:
    manager = starts(node, mem_pool_cfg=pool(40 * 1024, page_shift=10)).manager
    caches = [manager.allocate_cache(desc_of((3, 2, nbytes))) for nbytes in (700, 1, 512)]
    addrs = sorted(addr for cache in caches for addr in cache.tensor_addrs)
    assert [cache.cache_id for cache in caches] == [1, 2, 3]
    assert len(set(addrs)) == 9
    assert {(addr - addrs[0]) % 1024 for addr in addrs} == {0}
    for seed, cache in enumerate(caches):
        fill(cache, seed)
    for seed, cache in enumerate(caches):
        assert np.array_equal(view(cache), make_array((3, cache.cache_desc.size), seed))


@pytest.mark.shows("pool.exhausted")
def test_a_pool_without_room_says_in_the_log_how_full_it_is(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    manager = starts(node, mem_pool_cfg=pool(WHOLE_POOL)).manager
    manager.allocate_cache(desc_of((1, 1, 1)))
    with caplog.at_level(logging.ERROR, "LLM_DATADIST"):
        assert status_of(manager.allocate_cache, desc_of((4, 1, 1))) is NO_MEMORY
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert f"of {WHOLE_POOL} bytes free" in record.message


@pytest.mark.shows("pool.exhausted")
def test_each_tensor_takes_whole_pages(node: Node) -> None:
    manager = starts(node, mem_pool_cfg=pool(65536)).manager
    assert status_of(manager.allocate_cache, desc_of((2, 1, 2048))) is NO_MEMORY
    assert status_of(manager.allocate_cache, desc_of((1, 1, 2048))) is SUCCESS


def test_small_pages_hold_more_small_tensors(node: Node) -> None:
    manager = starts(node, mem_pool_cfg=pool(65536, page_shift=10)).manager
    assert len(manager.allocate_cache(desc_of((64, 1, 1024))).tensor_addrs) == 64
    assert status_of(manager.allocate_cache, desc_of((1, 1, 1))) is NO_MEMORY


@pytest.mark.shows("pool.exhausted", "error.33")
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


@pytest.mark.shows("pool.host", "cm.allocate_cache", "cm.allocate_blocks_cache")
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


@pytest.mark.shows("error.32", "pool.host")
@pytest.mark.parametrize(
    ("option", "placement"), [("mem_pool_cfg", HOST), ("host_mem_pool_cfg", DEVICE)]
)
def test_the_other_pool_does_not_do(node: Node, option: str, placement: Placement) -> None:
    manager = starts(node, **{option: pool(WHOLE_POOL)}).manager
    desc = desc_of((1, 1, 1), placement)
    assert status_of(manager.allocate_cache, desc) is INVALID
    assert status_of(manager.allocate_blocks_cache, desc) is INVALID


@pytest.mark.shows("error.32", "error.35")
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


def seconds_to_start(node: Node, config: str) -> float:
    begun = time.monotonic()
    starts(node, mem_pool_cfg=config)
    return time.monotonic() - begun


@pytest.mark.shows("pool.reserves")
def test_a_large_pool_is_there_at_once_and_takes_no_memory_until_it_is_used(node: Node) -> None:
    before = resident_nbytes()
    took = []
    for _ in range(5):  # the best one counts: others may have been interrupted
        node.stop()
        took.append(seconds_to_start(node, pool(18737418240)))
    assert min(took) < 0.05
    cache = node.manager.allocate_cache(desc_of((2, 1, 8 * 1024**3)))
    for tensor in view(cache):
        tensor[[0, -1]] = 1, 2
        assert tensor[[0, -1]].tolist() == [1, 2]
    assert resident_nbytes() - before < 64 * 1024 * 1024
    node.manager.deallocate_cache(cache)


@pytest.mark.shows("pool.host")
def test_the_host_pool_has_pages_of_its_own_size(node: Node) -> None:
    host = pool(4 * 1024 + 1023, page_shift=10)
    manager = starts(node, mem_pool_cfg=pool(PAGE), host_mem_pool_cfg=host).manager
    assert status_of(manager.allocate_cache, desc_of((5, 1, 1), HOST)) is NO_MEMORY
    cache = manager.allocate_cache(desc_of((4, 1, 1024), HOST))
    assert len({addr // 1024 for addr in cache.tensor_addrs}) == 4
    assert status_of(manager.allocate_cache, desc_of((1, 1, 1), HOST)) is NO_MEMORY
    manager.deallocate_cache(cache)
    assert status_of(manager.allocate_cache, desc_of((4, 1, 1024), HOST)) is SUCCESS


@pytest.mark.shows("pool.host")
def test_a_host_pool_alone_is_enough_to_deallocate_and_to_remove_keys(node: Node) -> None:
    manager = starts(node, host_mem_pool_cfg=pool(PAGE)).manager
    cache = manager.allocate_cache(desc_of((1, 1, 1), HOST), [key(1)])
    manager.deallocate_cache(cache)
    assert status_of(manager.allocate_cache, desc_of((1, 1, 1), HOST)) is NO_MEMORY
    manager.remove_cache_key(key(1))
    assert status_of(manager.allocate_cache, desc_of((1, 1, 1), HOST)) is SUCCESS
