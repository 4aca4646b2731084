"""The C++-shaped interface: its caches, and copies between them."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import cpp_cluster
import numpy as np
import pytest
from cpp_cluster import SHAPE, Cluster, describe, pool_cfg, pool_class

from llm_datadist import cpp as c
from llm_datadist.testing.cluster import Node, NodeProcess, addrs_of, make_array

make_cluster = cpp_cluster.make_cluster
cluster = cpp_cluster.cluster
trio = cpp_cluster.trio
remote = cpp_cluster.remote
ours = cpp_cluster.ours


# -- registering --


@pytest.mark.shows("cpp.RegisterKvCache", "cpp.UnregisterKvCache")
def test_a_registered_cache_is_found_until_it_is_unregistered(ours: Cluster) -> None:
    src, dst = ours.add(), ours.add()
    copy = ours.datadist.CopyKvCache
    assert copy(src, dst) == c.LLM_SUCCESS
    assert ours.datadist.UnregisterKvCache(src.cache_id) == c.LLM_SUCCESS
    assert copy(src, dst) == c.LLM_KV_CACHE_NOT_EXIST
    assert ours.datadist.UnregisterKvCache(src.cache_id) == c.LLM_SUCCESS
    assert ours.datadist.UnregisterKvCache(-1) == c.LLM_SUCCESS


@pytest.mark.shows("cpp.RegisterKvCache")
@pytest.mark.parametrize(
    ("changes", "addrs"),
    [
        ({}, []),
        ({}, [4096]),
        ({}, [4096] * 3),
        ({}, [4096, 0]),
        ({}, [4096, -1]),
        ({}, [4096, 2**64 - 1]),
        ({"num_tensors": 0}, []),
        ({"num_tensors": 2**32}, [4096, 4096]),
        ({"shape": []}, [4096, 4096]),
        ({"shape": [4, 0]}, [4096, 4096]),
        ({"shape": [4, -1]}, [4096, 4096]),
        ({"shape": [1] * 32}, [4096, 4096]),
        ({"shape": [2**32, 2**32]}, [4096, 4096]),
        ({"data_type": c.GeDataType.DT_UNDEFINED}, [4096, 4096]),
        ({"data_type": c.GeDataType.DT_RESOURCE}, [4096, 4096]),
        ({"data_type": c.GeDataType.DT_INT4, "shape": [2, 5]}, [4096, 4096]),
    ],
    ids=str,
)
def test_what_cannot_be_registered_is_invalid(
    cluster: Cluster, changes: dict[str, Any], addrs: list[int]
) -> None:
    desc = describe((2, 4, 64))
    for name, value in changes.items():
        setattr(desc, name, value)
    cluster.start()
    assert cluster.datadist.RegisterKvCache(desc, addrs) == (c.LLM_PARAM_INVALID, -1)
    assert cluster.add().cache_id == 1


@pytest.mark.shows("cpp.RegisterKvCache")
def test_registered_memory_of_either_placement_is_pulled_from_and_into(
    trio: tuple[Cluster, Cluster, Cluster],
) -> None:
    ours, peer, _ = trio
    array, desc = make_array(SHAPE, 1), describe(SHAPE)
    desc.placement = c.CachePlacement.kHost
    assert ours.datadist.RegisterKvCache(desc, addrs_of(array), c.RegisterCfg()) == (0, 1)
    host, theirs = c.Cache(1), peer.add(SHAPE, seed=2)
    assert ours.datadist.PullKvBlocks(c.CacheIndex(2, 1), host, [0], [7]) == c.LLM_SUCCESS
    assert peer.datadist.PullKvCache(c.CacheIndex(1, 1, 7), theirs, 1) == c.LLM_SUCCESS
    assert peer.datadist.PushKvBlocks(theirs, c.CacheIndex(1, 1), [2], [6]) == c.LLM_SUCCESS
    expected, source = make_array(SHAPE, 1), make_array(SHAPE, 2)
    expected[:, [7, 6]], source[:, 1] = source[:, [0, 2]], source[:, 0]
    assert np.array_equal(array, expected)
    assert np.array_equal(peer.array_of(theirs), source)


@pytest.mark.parametrize(
    ("data_type", "shape", "row_nbytes"),
    [
        (c.DataType.DT_FLOAT16, [4, 3, 5], 30),
        (c.GeDataType.DT_INT4, [4, 6], 3),
        (c.GeDataType.DT_FLOAT6_E3M2, [4, 4], 3),
        (c.GeDataType.DT_UINT1, [1, 17], 3),
        (c.GeDataType.DT_COMPLEX128, [4, 2], 32),
    ],
    ids=str,
)
def test_the_data_type_says_how_large_a_row_is(
    cluster: Cluster, data_type: c.DataType, shape: list[int], row_nbytes: int
) -> None:
    """Read off the largest copy that is allowed."""
    cluster.start()
    desc = c.CacheDesc(num_tensors=1, data_type=data_type, shape=shape)
    status, cache = cluster.datadist.AllocateCache(desc)
    assert status == c.LLM_SUCCESS
    copy = cluster.datadist.CopyKvCache
    last = shape[0] - 1
    if last:
        assert copy(cache, cache, 0, last, size=row_nbytes) == c.LLM_SUCCESS
    assert copy(cache, cache, 0, last, size=row_nbytes + 1) == c.LLM_PARAM_INVALID


# -- allocating --


@pytest.mark.shows("cpp.AllocateCache", "cpp.DeallocateCache")
def test_an_allocated_cache_serves_peers_until_it_is_freed(
    trio: tuple[Cluster, Cluster, Cluster],
) -> None:
    ours, peer, _ = trio
    cache = peer.allocate(SHAPE)
    assert len(set(cache.tensor_addrs)) == SHAPE[0]
    assert cache.cache_desc == describe(SHAPE)
    seeds = peer.add(SHAPE, seed=1)
    for row in range(SHAPE[1]):
        assert peer.datadist.CopyKvCache(seeds, cache, row, row) == c.LLM_SUCCESS
    target = ours.add(SHAPE)
    everything = list(range(SHAPE[1]))
    pull = ours.datadist.PullKvBlocks
    index = c.CacheIndex(2, cache.cache_id)
    assert pull(index, target, everything, everything) == c.LLM_SUCCESS
    assert np.array_equal(ours.array_of(target), make_array(SHAPE, 1))
    assert peer.datadist.DeallocateCache(cache.cache_id) == c.LLM_SUCCESS
    assert pull(index, target, everything, everything) == c.LLM_KV_CACHE_NOT_EXIST


@pytest.mark.shows("cpp.DeallocateCache")
def test_what_is_not_there_or_not_allocated_may_be_deallocated(cluster: Cluster) -> None:
    cluster.start()
    registered, other = cluster.add(), cluster.add()
    for cache_id in (registered.cache_id, 77, -1):
        assert cluster.datadist.DeallocateCache(cache_id) == c.LLM_SUCCESS
    assert cluster.datadist.CopyKvCache(registered, other) == c.LLM_SUCCESS


@pytest.mark.shows("cpp.AllocateCache", "cpp.OPTION_BUF_POOL_CFG")
def test_a_class_of_the_pool_serves_what_fits_it_and_no_more(cluster: Cluster) -> None:
    cluster.start(BUF_POOL_CFG=pool_cfg(pool_class(), buf_pool_size=1 << 21))
    allocate = cluster.datadist.AllocateCache
    caches = [cluster.allocate((16, 1, 8192)) for _ in range(16)]
    addrs = sorted(addr for cache in caches for addr in cache.tensor_addrs)
    assert np.array_equal(np.diff(addrs), [8192] * 255)
    full = allocate(describe((1, 1, 1)))
    assert full == (c.LLM_OUT_OF_MEMORY, c.Cache())
    assert cluster.datadist.DeallocateCache(caches[3].cache_id) == c.LLM_SUCCESS
    assert allocate(describe((17, 1, 8192)))[0] == c.LLM_OUT_OF_MEMORY
    assert allocate(describe((1, 1, 8193)))[0] == c.LLM_OUT_OF_MEMORY
    again = cluster.allocate((16, 1, 8192))
    assert set(again.tensor_addrs) == set(caches[3].tensor_addrs)


@pytest.mark.shows("cpp.OPTION_BUF_POOL_CFG")
def test_what_is_left_of_the_pools_size_serves_large_requests(cluster: Cluster) -> None:
    cluster.start(BUF_POOL_CFG=pool_cfg(pool_class(), buf_pool_size=3 << 20))
    assert cluster.datadist.AllocateCache(describe((1, 1, 1 << 21)))[0] == c.LLM_OUT_OF_MEMORY
    assert len(cluster.allocate((2, 1, 1 << 19)).tensor_addrs) == 2
    assert cluster.datadist.AllocateCache(describe((1, 1, 1 << 16)))[0] == c.LLM_OUT_OF_MEMORY


@pytest.mark.shows("cpp.AllocateCache")
@pytest.mark.parametrize("settings", [{}, {"BUF_POOL_CFG": "{}"}])
def test_without_a_configured_pool_there_is_the_machines_memory(
    cluster: Cluster, settings: dict[str, str]
) -> None:
    cluster.start(**settings)
    cluster.allocate((2, 4, 1 << 24))
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert cluster.datadist.AllocateCache(describe((1, 1, everything)))[0] == c.LLM_OUT_OF_MEMORY


def test_where_no_memory_can_be_reserved_only_allocating_fails(victim: NodeProcess) -> None:
    assert victim.call(allocate_in_little_memory) == (c.LLM_OUT_OF_MEMORY, c.Cache())


def allocate_in_little_memory(node: Node) -> tuple[c.Status, c.Cache]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (512 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return Cluster(1).start().datadist.AllocateCache(describe((1, 1, 64)))


@pytest.mark.shows("cpp.AllocateCache")
def test_allocating_needs_a_description_that_can_be(cluster: Cluster) -> None:
    cluster.start()
    host = describe(SHAPE)
    host.placement = c.CachePlacement.kHost
    for desc in (host, c.CacheDesc(), describe((0, 1, 64)), describe((1, 0, 64))):
        assert cluster.datadist.AllocateCache(desc) == (c.LLM_PARAM_INVALID, c.Cache())


# -- copying --


@pytest.mark.shows("cpp.CopyKvCache")
def test_a_row_is_copied_from_an_offset_on(cluster: Cluster) -> None:
    src, dst = cluster.start().add(SHAPE, seed=1), cluster.add((6, 3, 100), seed=2)
    copy = cluster.datadist.CopyKvCache
    assert copy(src, dst, 7, 2) == c.LLM_SUCCESS
    assert copy(src, dst, 5, 0, 60) == c.LLM_SUCCESS
    assert copy(src, dst, 5, 1, 10, 20) == c.LLM_SUCCESS
    source, expected = make_array(SHAPE, 1), make_array((6, 3, 100), 2)
    expected[:, 2, :64] = source[:, 7]
    expected[:, 0, 60:64] = source[:, 5, 60:]
    expected[:, 1, 10:30] = source[:, 5, 10:30]
    assert np.array_equal(cluster.array_of(dst), expected)


@pytest.mark.shows("cpp.CopyKvCache")
@pytest.mark.parametrize(
    "args",
    [(8, 0), (0, 3), (-1, 0), (0, 0, 64), (0, 0, -1), (0, 0, 0, 0), (0, 0, 0, 65), (0, 0, 60, 5)],
    ids=str,
)
def test_a_copy_that_does_not_fit_is_invalid(cluster: Cluster, args: tuple[int, ...]) -> None:
    src, dst = cluster.start().add(SHAPE, seed=1), cluster.add((6, 3, 64), seed=2)
    assert cluster.datadist.CopyKvCache(src, dst, *args) == c.LLM_PARAM_INVALID
    assert np.array_equal(cluster.array_of(dst), make_array((6, 3, 64), 2))


@pytest.mark.shows("cpp.CopyKvCache", "cpp.CopyKvBlocks")
def test_copying_needs_two_caches_with_as_many_tensors(cluster: Cluster) -> None:
    src, dst = cluster.start().add(SHAPE), cluster.add((5, 8, 64))
    gone = c.Cache(99)
    copy, copy_blocks = cluster.datadist.CopyKvCache, cluster.datadist.CopyKvBlocks
    assert copy(src, dst) == c.LLM_PARAM_INVALID
    assert copy_blocks(src, dst, [0], [[0]]) == c.LLM_PARAM_INVALID
    for pair in ((gone, dst), (src, gone)):
        assert copy(*pair) == c.LLM_KV_CACHE_NOT_EXIST
        assert copy_blocks(*pair, [0], [[0]]) == c.LLM_KV_CACHE_NOT_EXIST


@pytest.mark.shows("cpp.CopyKvBlocks")
def test_blocks_are_copied_to_every_list(cluster: Cluster) -> None:
    src, dst = cluster.start().add(SHAPE, seed=1), cluster.add((6, 20, 64), seed=2)
    copy = cluster.datadist.CopyKvBlocks
    assert copy(src, dst, [1, 7], [[0, 19], [5, 4], [6, 7]]) == c.LLM_SUCCESS
    assert copy(src, src, [0], [[3]]) == c.LLM_SUCCESS
    assert copy(src, dst, [], []) == c.LLM_SUCCESS
    source, expected = make_array(SHAPE, 1), make_array((6, 20, 64), 2)
    expected[:, [0, 5, 6]] = source[:, [1]]
    expected[:, [19, 4, 7]] = source[:, [7]]
    source[:, 3] = source[:, 0]
    assert np.array_equal(cluster.array_of(dst), expected)
    assert np.array_equal(cluster.array_of(src), source)


@pytest.mark.shows("cpp.CopyKvBlocks")
@pytest.mark.parametrize(
    ("src_blocks", "lists"),
    [([0], [[0, 1]]), ([0, 1], [[2, 3], [4]]), ([8], [[0]]), ([0], [[8]]), ([-1], [[0]])],
    ids=str,
)
def test_blocks_that_do_not_pair_or_are_not_there_are_invalid(
    cluster: Cluster, src_blocks: list[int], lists: list[list[int]]
) -> None:
    cache = cluster.start().add(SHAPE, seed=1)
    assert cluster.datadist.CopyKvBlocks(cache, cache, src_blocks, lists) == c.LLM_PARAM_INVALID
    assert np.array_equal(cluster.array_of(cache), make_array(SHAPE, 1))


def test_blocks_of_unequal_size_are_invalid(cluster: Cluster) -> None:
    src, dst = cluster.start().add(SHAPE, seed=1), cluster.add((6, 8, 32), seed=2)
    assert cluster.datadist.CopyKvBlocks(src, dst, [0], [[0]]) == c.LLM_PARAM_INVALID
    assert np.array_equal(cluster.array_of(dst), make_array((6, 8, 32), 2))
