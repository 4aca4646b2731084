"""The C++-shaped interface: its caches, and all that moves between them."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cpp_cluster import (
    LISTEN,
    SHAPE,
    Cluster,
    add_there,
    clusters,
    describe,
    info_of,
    look_there,
    pool_cfg,
    pool_class,
    start_there,
    stop_there,
    unregister_there,
)

from llm_datadist import cpp as c
from llm_datadist.testing.cluster import Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpp_cluster import MakeCluster


@pytest.fixture
def make_cluster() -> Iterator[MakeCluster]:
    with clusters() as make:
        yield make


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    """Not initialised yet."""
    return make_cluster()


@pytest.fixture
def trio(make_cluster: MakeCluster, path: str) -> tuple[Cluster, Cluster, Cluster]:
    """Cluster 1 of this process, linked to 2 and 3 of this process."""
    ours, second, third = (make_cluster() for _ in range(3))
    ours.start(path)
    for peer in (second, third):
        peer.start(path, LISTEN_IP_INFO=LISTEN)
    assert ours.link(second, third) == [c.LLM_SUCCESS] * 2
    assert [link.path for link in ours.datadist.links()] == [path] * 2
    return ours, second, third


@pytest.fixture
def remote(peer: NodeProcess) -> Iterator[NodeProcess]:
    """Another process for clusters, finalized after the test."""
    yield peer
    peer.call(stop_there)


@pytest.fixture
def ours(cluster: Cluster, remote: NodeProcess, path: str) -> Cluster:
    """Cluster 1, linked to cluster 5 of the other process."""
    port = remote.call(start_there, 5, path)
    cluster.start(path)
    infos = [info_of(5, port)]
    assert cluster.datadist.LinkLlmClusters(infos, 3000) == (c.LLM_SUCCESS, [c.LLM_SUCCESS])
    assert [link.path for link in cluster.datadist.links()] == [path]
    return cluster


# -- registering --


def test_a_registered_cache_is_found_until_it_is_unregistered(ours: Cluster) -> None:
    src, dst = ours.add(), ours.add()
    copy = ours.datadist.CopyKvCache
    assert copy(src, dst) == c.LLM_SUCCESS
    assert ours.datadist.UnregisterKvCache(src.cache_id) == c.LLM_SUCCESS
    assert copy(src, dst) == c.LLM_KV_CACHE_NOT_EXIST
    assert ours.datadist.UnregisterKvCache(src.cache_id) == c.LLM_SUCCESS
    assert ours.datadist.UnregisterKvCache(-1) == c.LLM_SUCCESS


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


def test_what_is_not_there_or_not_allocated_may_be_deallocated(cluster: Cluster) -> None:
    cluster.start()
    registered, other = cluster.add(), cluster.add()
    for cache_id in (registered.cache_id, 77, -1):
        assert cluster.datadist.DeallocateCache(cache_id) == c.LLM_SUCCESS
    assert cluster.datadist.CopyKvCache(registered, other) == c.LLM_SUCCESS


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


def test_what_is_left_of_the_pools_size_serves_large_requests(cluster: Cluster) -> None:
    cluster.start(BUF_POOL_CFG=pool_cfg(pool_class(), buf_pool_size=3 << 20))
    assert cluster.datadist.AllocateCache(describe((1, 1, 1 << 21)))[0] == c.LLM_OUT_OF_MEMORY
    assert len(cluster.allocate((2, 1, 1 << 19)).tensor_addrs) == 2
    assert cluster.datadist.AllocateCache(describe((1, 1, 1 << 16)))[0] == c.LLM_OUT_OF_MEMORY


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


def test_allocating_needs_a_description_that_can_be(cluster: Cluster) -> None:
    cluster.start()
    host = describe(SHAPE)
    host.placement = c.CachePlacement.kHost
    for desc in (host, c.CacheDesc(), describe((0, 1, 64)), describe((1, 0, 64))):
        assert cluster.datadist.AllocateCache(desc) == (c.LLM_PARAM_INVALID, c.Cache())


# -- pulling --


def test_blocks_and_rows_are_pulled_from_another_process(
    ours: Cluster, remote: NodeProcess
) -> None:
    theirs = remote.call(add_there, 5, (6, 16, 64), 1)
    cache = ours.add(SHAPE, seed=2)
    index = c.CacheIndex(5, theirs)
    pull_blocks, pull_row = ours.datadist.PullKvBlocks, ours.datadist.PullKvCache
    assert pull_blocks(index, cache, [15, 3, 4], [0, 6, 7]) == c.LLM_SUCCESS
    expected, source = make_array(SHAPE, 2), make_array((6, 16, 64), 1)
    expected[:, [0, 6, 7]] = source[:, [15, 3, 4]]
    assert np.array_equal(ours.array_of(cache), expected)
    assert pull_row(c.CacheIndex(5, theirs, 9), cache, 2, 40) == c.LLM_SUCCESS
    expected[:, 2, :40] = source[:, 9, :40]
    assert np.array_equal(ours.array_of(cache), expected)


def test_three_instances_of_one_process_move_between_each_other(
    trio: tuple[Cluster, Cluster, Cluster],
) -> None:
    ours, second, third = trio
    caches = [each.add(SHAPE, seed=each.cluster_id) for each in trio]
    pull, push = ours.datadist.PullKvBlocks, ours.datadist.PushKvBlocks
    assert [cache.cache_id for cache in caches] == [1, 1, 1]
    assert pull(c.CacheIndex(2, 1), caches[0], [0], [5]) == c.LLM_SUCCESS
    assert push(caches[0], c.CacheIndex(3, 1), [5, 1], [0, 7]) == c.LLM_SUCCESS
    back = third.datadist.PullKvCache(c.CacheIndex(1, 1, 1), caches[2], 3)
    assert back == c.LLM_SUCCESS
    first = make_array(SHAPE, 1)
    first[:, 5] = make_array(SHAPE, 2)[:, 0]
    expected = make_array(SHAPE, 3)
    expected[:, [0, 7]], expected[:, 3] = first[:, [5, 1]], first[:, 1]
    assert np.array_equal(ours.array_of(caches[0]), first)
    assert np.array_equal(second.array_of(caches[1]), make_array(SHAPE, 2))
    assert np.array_equal(third.array_of(caches[2]), expected)
    assert third.datadist.PullKvCache(c.CacheIndex(2, 1), caches[2]) == c.LLM_NOT_YET_LINK


@pytest.mark.parametrize(
    ("ext", "moved"),
    [
        (c.KvCacheExtParam(), (range(6), range(6))),
        (c.KvCacheExtParam((0, 0), (2, 2)), (range(2), range(4, 6))),
        (c.KvCacheExtParam((1, 2), (0, 1)), (range(2, 6), range(4))),
        (c.KvCacheExtParam((1, 4), (2, 5), 1), (range(1, 5), range(2, 6))),
        (c.KvCacheExtParam((0, 0)), (range(6), range(6))),  # both are needed to count
        (c.KvCacheExtParam((-1, 4), (0, 0)), (range(6), range(6))),
        (c.KvCacheExtParam(tensor_num_per_layer=7), (range(6), range(6))),
        (c.KvCacheExtParam((0, 1), (0, 0)), None),
        (c.KvCacheExtParam((2, 3), (0, 1)), None),
        (c.KvCacheExtParam((0, 1), (2, 3)), None),
        (c.KvCacheExtParam((0, 0), (0, 0), 4), None),
        (c.KvCacheExtParam((-2, 0)), None),
        (c.KvCacheExtParam((1, 0)), None),
        (c.KvCacheExtParam((0, 2**31), (0, 2**31)), None),
        (c.KvCacheExtParam(tensor_num_per_layer=0), None),
        (c.KvCacheExtParam(tensor_num_per_layer=256), None),
    ],
    ids=str,
)
def test_inclusive_layers_pick_what_is_pulled(
    ours: Cluster,
    remote: NodeProcess,
    ext: c.KvCacheExtParam,
    moved: tuple[range, range] | None,
) -> None:
    theirs = remote.call(add_there, 5, SHAPE, 1)
    status = c.LLM_PARAM_INVALID if moved is None else c.LLM_SUCCESS
    source, index = make_array(SHAPE, 1), c.CacheIndex(5, theirs)
    blocks, rows = ours.add(SHAPE), ours.add(SHAPE)
    expected = make_array(SHAPE, None)
    if moved is not None:
        expected[list(moved[1]), 3] = source[list(moved[0]), 0]
    assert ours.datadist.PullKvBlocks(index, blocks, [0], [3], ext) == status
    assert ours.datadist.PullKvCache(index, rows, 3, ext_param=ext) == status
    assert np.array_equal(ours.array_of(blocks), expected)
    assert np.array_equal(ours.array_of(rows), expected)


def test_a_pull_that_cannot_be_says_why_and_writes_nothing(
    ours: Cluster, remote: NodeProcess
) -> None:
    theirs = remote.call(add_there, 5, SHAPE, 1)
    other = remote.call(add_there, 5, (6, 8, 32), 1)
    cache = ours.add(SHAPE, seed=2)
    index, gone = c.CacheIndex(5, theirs), c.Cache(99)
    row, blocks = ours.datadist.PullKvCache, ours.datadist.PullKvBlocks
    invalid, missing = c.LLM_PARAM_INVALID, c.LLM_KV_CACHE_NOT_EXIST
    assert row(c.CacheIndex(5, 99), cache) == missing
    assert row(c.CacheIndex(5, 0), cache) == missing
    assert row(c.CacheIndex(5, theirs, 8), cache) == missing
    assert row(index, gone) == missing
    assert row(c.CacheIndex(6, theirs), cache) == c.LLM_NOT_YET_LINK
    assert row(c.CacheIndex(1, theirs), cache) == invalid
    assert row(c.CacheIndex(5, theirs, -1), cache) == invalid
    assert row(index, cache, 8) == invalid
    assert row(index, cache, -1) == invalid
    assert row(index, cache, 0, 0) == invalid
    assert row(index, cache, 0, -2) == invalid
    assert row(index, cache, 0, 65) == invalid
    assert row(c.CacheIndex(5, other), cache) == invalid
    assert blocks(c.CacheIndex(5, 99), cache, [0], [0]) == missing
    assert blocks(index, gone, [0], [0]) == missing
    assert blocks(c.CacheIndex(6, theirs), cache, [0], [0]) == c.LLM_NOT_YET_LINK
    assert blocks(c.CacheIndex(1, theirs), cache, [0], [0]) == invalid
    assert blocks(c.CacheIndex(5, theirs, 1), cache, [0], [0]) == invalid
    assert blocks(index, cache, [], []) == invalid
    assert blocks(index, cache, [0, 1], [0]) == invalid
    assert blocks(index, cache, [8], [0]) == invalid
    assert blocks(index, cache, [0], [8]) == invalid
    assert blocks(index, cache, [-1], [0]) == invalid
    assert blocks(c.CacheIndex(5, other), cache, [0], [0]) == invalid
    assert np.array_equal(ours.array_of(cache), make_array(SHAPE, 2))


def test_a_cache_that_its_owner_unregistered_is_missing(ours: Cluster, remote: NodeProcess) -> None:
    theirs = remote.call(add_there, 5, SHAPE, 1)
    cache = ours.add(SHAPE)
    index = c.CacheIndex(5, theirs)
    assert ours.datadist.PullKvCache(index, cache) == c.LLM_SUCCESS
    assert remote.call(unregister_there, 5, theirs) == c.LLM_SUCCESS
    assert ours.datadist.PullKvCache(index, cache) == c.LLM_KV_CACHE_NOT_EXIST


def test_a_peer_that_stands_still_is_a_timeout(
    cluster: Cluster, victim: NodeProcess, path: str
) -> None:
    port = victim.call(start_there, 5, path)
    theirs = victim.call(add_there, 5, SHAPE, 1)
    cluster.start(path, SYNC_CACHE_WAIT_TIME="200")
    assert cluster.datadist.LinkLlmClusters([info_of(5, port)], 3000)[0] == c.LLM_SUCCESS
    cache, index = cluster.add(SHAPE), c.CacheIndex(5, theirs)
    victim.pause()
    assert cluster.datadist.PullKvCache(index, cache) == c.LLM_TIMEOUT
    assert cluster.datadist.PullKvBlocks(index, cache, [0], [0]) == c.LLM_TIMEOUT
    assert cluster.datadist.PushKvCache(cache, index) == c.LLM_TIMEOUT
    assert cluster.datadist.PushKvBlocks(cache, index, [0], [0]) == c.LLM_TIMEOUT


# -- pushing --


def test_blocks_and_rows_are_pushed_to_another_process(ours: Cluster, remote: NodeProcess) -> None:
    theirs = remote.call(add_there, 5, (6, 16, 64), 1)
    cache = ours.add(SHAPE, seed=2)
    push_blocks, push_row = ours.datadist.PushKvBlocks, ours.datadist.PushKvCache
    assert push_blocks(cache, c.CacheIndex(5, theirs), [7, 0], [3, 15]) == c.LLM_SUCCESS
    assert push_row(cache, c.CacheIndex(5, theirs, 9), 4) == c.LLM_SUCCESS
    source, expected = make_array(SHAPE, 2), make_array((6, 16, 64), 1)
    expected[:, [3, 15]], expected[:, 9] = source[:, [7, 0]], source[:, 4]
    assert np.array_equal(remote.call(look_there, 5, theirs), expected)


@pytest.mark.parametrize(
    ("ext", "moved"),
    [
        (c.KvCacheExtParam(), (range(10), range(10))),
        (c.KvCacheExtParam((0, 1), (0, 1), 1), (range(2), range(2))),
        (c.KvCacheExtParam((0, 1), (0, 1), 2), (range(4), range(4))),
        (c.KvCacheExtParam((3, 4), (0, 1), 2), (range(6, 10), range(4))),
        (c.KvCacheExtParam((-1, 0), (3, 4)), (range(10), range(10))),
        (c.KvCacheExtParam(tensor_num_per_layer=10), (range(10), range(10))),
        (c.KvCacheExtParam((0, 1), (0, 1), 7), None),
        (c.KvCacheExtParam((0, 1), (0, 1), 17), None),
        (c.KvCacheExtParam(tensor_num_per_layer=7), None),
        (c.KvCacheExtParam(tensor_num_per_layer=17), None),  # never success with nothing moved
        (c.KvCacheExtParam((0, 0)), None),
        (c.KvCacheExtParam((0, 1), (0, 0)), None),
        (c.KvCacheExtParam((-1, -1), (0, 1)), None),
        (c.KvCacheExtParam((4, 5), (0, 1)), None),
        (c.KvCacheExtParam((0, 1), (4, 5)), None),
        (c.KvCacheExtParam(tensor_num_per_layer=0), None),
    ],
    ids=str,
)
def test_inclusive_layers_pick_what_is_pushed(
    ours: Cluster,
    remote: NodeProcess,
    ext: c.KvCacheExtParam,
    moved: tuple[range, range] | None,
) -> None:
    shape = (10, 2, 64)
    status = c.LLM_PARAM_INVALID if moved is None else c.LLM_SUCCESS
    cache, source = ours.add(shape, seed=1), make_array(shape, 1)
    blocks, rows = (remote.call(add_there, 5, shape, 2) for _ in range(2))
    expected = make_array(shape, 2)
    if moved is not None:
        expected[list(moved[1]), 1] = source[list(moved[0]), 0]
    push_blocks, push_row = ours.datadist.PushKvBlocks, ours.datadist.PushKvCache
    assert push_blocks(cache, c.CacheIndex(5, blocks), [0], [1], ext) == status
    assert push_row(cache, c.CacheIndex(5, rows, 1), 0, ext_param=ext) == status
    assert np.array_equal(remote.call(look_there, 5, blocks), expected)
    assert np.array_equal(remote.call(look_there, 5, rows), expected)


def test_a_push_that_cannot_be_says_why_and_writes_nothing(
    ours: Cluster, remote: NodeProcess
) -> None:
    theirs = remote.call(add_there, 5, SHAPE, 1)
    small = remote.call(add_there, 5, (6, 8, 32), 1)
    cache = ours.add(SHAPE, seed=2)
    host = c.Cache(cache.cache_id, [], c.CacheDesc(c.CachePlacement.kHost, 6))
    index, gone = c.CacheIndex(5, theirs), c.Cache(99)
    row, blocks = ours.datadist.PushKvCache, ours.datadist.PushKvBlocks
    invalid, missing = c.LLM_PARAM_INVALID, c.LLM_KV_CACHE_NOT_EXIST
    assert row(gone, index) == missing
    assert row(cache, c.CacheIndex(5, 99)) == missing
    assert row(cache, c.CacheIndex(5, theirs, 8)) == missing
    assert row(cache, c.CacheIndex(6, theirs)) == c.LLM_NOT_YET_LINK
    assert row(host, index) == invalid
    assert row(cache, index, 8) == invalid
    assert row(cache, index, 0, 64) == invalid
    assert row(cache, c.CacheIndex(5, small)) == invalid
    assert blocks(gone, index, [0], [0]) == missing
    assert blocks(cache, c.CacheIndex(5, 99), [0], [0]) == missing
    assert blocks(cache, c.CacheIndex(6, theirs), [0], [0]) == c.LLM_NOT_YET_LINK
    assert blocks(host, index, [0], [0]) == invalid
    assert blocks(cache, c.CacheIndex(5, theirs, 1), [0], [0]) == invalid
    assert blocks(cache, index, [], []) == invalid
    assert blocks(cache, index, [0, 1], [0]) == invalid
    assert blocks(cache, index, [8], [0]) == invalid
    assert blocks(cache, index, [0], [8]) == invalid
    assert blocks(cache, c.CacheIndex(5, small), [0], [0]) == invalid
    assert np.array_equal(remote.call(look_there, 5, theirs), make_array(SHAPE, 1))
    assert np.array_equal(remote.call(look_there, 5, small), make_array((6, 8, 32), 1))


# -- copying --


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


@pytest.mark.parametrize(
    "args",
    [(8, 0), (0, 3), (-1, 0), (0, 0, 64), (0, 0, -1), (0, 0, 0, 0), (0, 0, 0, 65), (0, 0, 60, 5)],
    ids=str,
)
def test_a_copy_that_does_not_fit_is_invalid(cluster: Cluster, args: tuple[int, ...]) -> None:
    src, dst = cluster.start().add(SHAPE, seed=1), cluster.add((6, 3, 64), seed=2)
    assert cluster.datadist.CopyKvCache(src, dst, *args) == c.LLM_PARAM_INVALID
    assert np.array_equal(cluster.array_of(dst), make_array((6, 3, 64), 2))


def test_copying_needs_two_caches_with_as_many_tensors(cluster: Cluster) -> None:
    src, dst = cluster.start().add(SHAPE), cluster.add((5, 8, 64))
    gone = c.Cache(99)
    copy, copy_blocks = cluster.datadist.CopyKvCache, cluster.datadist.CopyKvBlocks
    assert copy(src, dst) == c.LLM_PARAM_INVALID
    assert copy_blocks(src, dst, [0], [[0]]) == c.LLM_PARAM_INVALID
    for pair in ((gone, dst), (src, gone)):
        assert copy(*pair) == c.LLM_KV_CACHE_NOT_EXIST
        assert copy_blocks(*pair, [0], [[0]]) == c.LLM_KV_CACHE_NOT_EXIST


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
