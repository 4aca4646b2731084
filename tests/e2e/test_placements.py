"""Pull, push and copy in every combination of HOST and DEVICE. Spec 6.8 to 6.11."""

from __future__ import annotations

import linked_pair
import numpy as np
import pytest
from linked_pair import Pair, add_blocks, add_rows

from llm_datadist import BlocksCacheKey, CacheKeyByIdAndIndex, Placement
from llm_datadist.testing.cluster import Node, make_array

pair = linked_pair.pair
pusher = linked_pair.pusher

SHAPE = (2, 4, 64)


@pytest.fixture(params=Placement, ids=lambda placement: f"from-{placement.name}")
def source(request: pytest.FixtureRequest) -> Placement:
    return Placement(request.param)


@pytest.fixture(params=Placement, ids=lambda placement: f"to-{placement.name}")
def target(request: pytest.FixtureRequest) -> Placement:
    return Placement(request.param)


def is_moved(node: Node, cache_id: int) -> bool:
    """Whether row 1 of the source is row 2 here, and nothing else came."""
    expected = make_array(SHAPE, 2)
    expected[:, 2] = make_array(SHAPE, 1)[:, 1]
    return np.array_equal(node.arrays[cache_id], expected)


@pytest.mark.shows("cm.host_device", "error.60")
def test_pulls_between_placements(pair: Pair, source: Placement, target: Placement) -> None:
    """Host to host too, in both modes."""
    settings = {"placement": source, "remote_accessible": True}
    rows_id = pair.peer.call(add_rows, *SHAPE, seed=1, **settings)
    pair.peer.call(add_blocks, *SHAPE, seed=1, key=BlocksCacheKey(1, 0), **settings)
    rows = pair.node.rows_cache(*SHAPE, seed=2, placement=target, remote_accessible=True)
    blocks = pair.node.blocks_cache(*SHAPE, seed=2, placement=target, remote_accessible=True)
    spread = pair.node.blocks_cache(*SHAPE, seed=2, placement=target, remote_accessible=True)
    key = CacheKeyByIdAndIndex(1, rows_id, 1)
    pair.node.manager.pull_cache(key, rows, 2)
    pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), blocks, [1], [2])
    pair.node.manager.pull_blocks(key, spread, (), [2])
    for cache in (rows, blocks, spread):
        assert is_moved(pair.node, cache.cache_id)


@pytest.mark.shows("cm.host_device", "D19")
def test_pushes_between_placements(pusher: Pair, source: Placement, target: Placement) -> None:
    settings = {"placement": target, "remote_accessible": True}
    rows_id = pusher.peer.call(add_rows, *SHAPE, seed=2, **settings)
    blocks_id = pusher.peer.call(add_blocks, *SHAPE, seed=2, key=BlocksCacheKey(1, 0), **settings)
    rows = pusher.node.rows_cache(*SHAPE, seed=1, placement=source, remote_accessible=True)
    blocks = pusher.node.blocks_cache(*SHAPE, seed=1, placement=source, remote_accessible=True)
    pusher.node.manager.push_cache(CacheKeyByIdAndIndex(1, rows_id, 2), rows, 1)
    pusher.node.manager.push_blocks(BlocksCacheKey(1, 0), blocks, [1], [2])
    for cache_id in (rows_id, blocks_id):
        assert pusher.peer.call(is_moved, cache_id)


@pytest.mark.shows("cm.host_device")
def test_copies_between_placements(pair: Pair, source: Placement, target: Placement) -> None:
    src = pair.node.rows_cache(*SHAPE, seed=1, placement=source)
    dst = pair.node.rows_cache(*SHAPE, seed=2, placement=target)
    pair.node.manager.copy_cache(dst, src, 2, 1)
    assert is_moved(pair.node, dst.cache_id)
