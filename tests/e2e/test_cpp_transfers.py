"""The C++-shaped interface: all that moves between its clusters."""

from __future__ import annotations

import cpp_cluster
import numpy as np
import pytest
from cpp_cluster import (
    SHAPE,
    Cluster,
    add_there,
    info_of,
    look_there,
    start_there,
    unregister_there,
)

from llm_datadist import cpp as c
from llm_datadist.testing.cluster import NodeProcess, make_array

make_cluster = cpp_cluster.make_cluster
cluster = cpp_cluster.cluster
trio = cpp_cluster.trio
remote = cpp_cluster.remote
ours = cpp_cluster.ours


# -- pulling --


@pytest.mark.shows("cpp.PullKvCache", "cpp.PullKvBlocks", "cpp.RegisterKvCache")
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


@pytest.mark.shows("cpp.instances")
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


@pytest.mark.shows("cpp.PullKvCache", "cpp.PullKvBlocks", "cpp.ext_param")
@pytest.mark.parametrize(
    ("ext", "moved"),
    [
        (c.KvCacheExtParam(), (range(6), range(6))),
        (c.KvCacheExtParam((0, 0), (2, 2)), (range(2), range(4, 6))),
        (c.KvCacheExtParam((1, 2), (0, 1)), (range(2, 6), range(4))),
        (c.KvCacheExtParam((1, 4), (2, 5), 1), (range(1, 5), range(2, 6))),
        (c.KvCacheExtParam((0, 0)), (range(6), range(6))),  # both are needed to count
        (c.KvCacheExtParam((-1, 4), (0, 0)), (range(6), range(6))),
        (c.KvCacheExtParam((-1, -1), (2, 2)), (range(6), range(6))),
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


@pytest.mark.shows("cpp.PullKvCache", "cpp.PullKvBlocks")
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


@pytest.mark.shows("cpp.UnregisterKvCache")
def test_a_cache_that_its_owner_unregistered_is_missing(ours: Cluster, remote: NodeProcess) -> None:
    theirs = remote.call(add_there, 5, SHAPE, 1)
    cache = ours.add(SHAPE)
    index = c.CacheIndex(5, theirs)
    assert ours.datadist.PullKvCache(index, cache) == c.LLM_SUCCESS
    assert remote.call(unregister_there, 5, theirs) == c.LLM_SUCCESS
    assert ours.datadist.PullKvCache(index, cache) == c.LLM_KV_CACHE_NOT_EXIST


@pytest.mark.shows("cpp.OPTION_SYNC_CACHE_WAIT_TIME")
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


@pytest.mark.shows("cpp.PushKvCache", "cpp.PushKvBlocks")
def test_blocks_and_rows_are_pushed_to_another_process(ours: Cluster, remote: NodeProcess) -> None:
    theirs = remote.call(add_there, 5, (6, 16, 64), 1)
    cache = ours.add(SHAPE, seed=2)
    push_blocks, push_row = ours.datadist.PushKvBlocks, ours.datadist.PushKvCache
    assert push_blocks(cache, c.CacheIndex(5, theirs), [7, 0], [3, 15]) == c.LLM_SUCCESS
    assert push_row(cache, c.CacheIndex(5, theirs, 9), 4) == c.LLM_SUCCESS
    source, expected = make_array(SHAPE, 2), make_array((6, 16, 64), 1)
    expected[:, [3, 15]], expected[:, 9] = source[:, [7, 0]], source[:, 4]
    assert np.array_equal(remote.call(look_there, 5, theirs), expected)


@pytest.mark.shows("cpp.PushKvCache", "cpp.PushKvBlocks", "cpp.ext_param")
@pytest.mark.parametrize(
    ("ext", "moved"),
    [
        (c.KvCacheExtParam(), (range(10), range(10))),
        (c.KvCacheExtParam((0, 1), (0, 1), 1), (range(2), range(2))),
        (c.KvCacheExtParam((0, 1), (0, 1), 2), (range(4), range(4))),
        (c.KvCacheExtParam((3, 4), (0, 1), 2), (range(6, 10), range(4))),
        (c.KvCacheExtParam((-1, 0), (3, 4)), (range(10), range(10))),
        (c.KvCacheExtParam((-1, -1), (2, 2)), (range(10), range(10))),
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


@pytest.mark.shows("cpp.PushKvCache", "cpp.PushKvBlocks")
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
