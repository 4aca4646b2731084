"""How full the pools are, as `LLMDataDist.pools` says. Spec 12, line 19."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMDataDist, LLMRole, Placement

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

PAGE = 65536
HOST, DEVICE = Placement.HOST, Placement.DEVICE


def pages(num_pages: int) -> str:
    return json.dumps({"memory_size": num_pages * PAGE})


def figures(node: Node, placement: Placement) -> list[tuple[str, int, int, int]]:
    parts = node.datadist.pools()[placement]
    for part in parts:
        assert part.used_nbytes + part.free_nbytes == part.capacity_nbytes
        assert part.largest_free_nbytes <= part.free_nbytes
    return [(each.name, each.capacity_nbytes, each.used_nbytes, each.free_nbytes) for each in parts]


@pytest.mark.shows("pool.usage", "relies.19")
def test_each_pool_tells_its_free_and_used_bytes(node: Node) -> None:
    node.start(LLMRole.PROMPT, 1, mem_pool_cfg=pages(8), host_mem_pool_cfg=pages(2))
    assert figures(node, DEVICE) == [("pages", 8 * PAGE, 0, 8 * PAGE)]
    cache = node.manager.allocate_cache(CacheDesc(3, [1, 96], DataType.DT_INT8))
    host = CacheDesc(1, [4, PAGE // 4], DataType.DT_INT8, HOST)
    node.manager.allocate_blocks_cache(host, BlocksCacheKey(1, 0))
    assert figures(node, DEVICE) == [("pages", 8 * PAGE, 3 * PAGE, 5 * PAGE)]
    assert figures(node, HOST) == [("pages", 2 * PAGE, PAGE, PAGE)]
    node.manager.deallocate_cache(cache)
    assert figures(node, DEVICE) == [("pages", 8 * PAGE, 0, 8 * PAGE)]


@pytest.mark.shows("pool.usage")
def test_a_fragmented_pool_tells_what_one_request_can_have(node: Node) -> None:
    node.start(LLMRole.PROMPT, 1, mem_pool_cfg=pages(4))
    desc = CacheDesc(1, [1, PAGE], DataType.DT_INT8)
    caches = [node.manager.allocate_cache(desc) for _ in range(4)]
    for cache in caches[::2]:
        node.manager.deallocate_cache(cache)
    (usage,) = node.datadist.pools()[DEVICE]
    assert (usage.free_nbytes, usage.largest_free_nbytes) == (2 * PAGE, PAGE)


@pytest.mark.shows("pool.usage")
def test_size_classes_are_told_apart(node: Node) -> None:
    classes = [{"total_size": 1 << 21, "blk_size": 256, "max_buf_size": 8192}]
    node.start(LLMRole.PROMPT, 1, buf_pool_cfg=json.dumps({"buf_cfg": classes}))
    node.manager.allocate_cache(CacheDesc(2, [1, 300], DataType.DT_INT8))
    assert figures(node, DEVICE)[0] == ("class 8192", 1 << 21, 1024, (1 << 21) - 1024)


@pytest.mark.shows("pool.usage")
def test_without_pools_there_is_nothing_to_tell(node: Node) -> None:
    node.start(LLMRole.PROMPT, 1)
    assert node.datadist.pools() == {}
    with pytest.raises(RuntimeError, match="not initialized"):
        LLMDataDist(LLMRole.PROMPT, 2).pools()
