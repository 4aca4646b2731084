"""Pushing between two processes: the right bytes, nothing else touched. Spec 6.11."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import linked_pair
import numpy as np
import pytest
from linked_pair import GONE, INVALID, Pair, add_blocks, add_rows, make_pair, status_of

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array

PAGE = 65536
SHAPE = (6, 8, 64)

pusher = linked_pair.pusher


def push_to_caller(node: Node, seed: int) -> None:
    """Run by the listener: pushes to whoever called it (cluster 2)."""
    cache = node.blocks_cache(*SHAPE, seed=seed)
    node.manager.push_blocks(BlocksCacheKey(2, 0), cache, [1, 2], [7, 0])


@pytest.mark.shows("cm.push_blocks")
def test_push_blocks_moves_exactly_the_named_blocks(pusher: Pair) -> None:
    theirs = pusher.peer.call(add_blocks, *SHAPE, seed=2, key=BlocksCacheKey(1, 0))
    cache = pusher.node.blocks_cache(6, 20, 64, seed=1)
    pusher.node.manager.push_blocks(BlocksCacheKey(1, 0), cache, [19, 3, 4], [0, 6, 7])
    expected = make_array(SHAPE, 2)
    expected[:, [0, 6, 7]] = make_array((6, 20, 64), 1)[:, [19, 3, 4]]
    assert np.array_equal(pusher.theirs(theirs), expected)


def test_a_listener_pushes_over_a_link_that_its_caller_made(pusher: Pair) -> None:
    cache = pusher.node.blocks_cache(*SHAPE, key=BlocksCacheKey(2, 0))
    pusher.peer.call(push_to_caller, 5)
    got = pusher.node.arrays[cache.cache_id][:, [7, 0]]
    assert np.array_equal(got, make_array(SHAPE, 5)[:, [1, 2]])


@pytest.mark.shows("cm.push_cache", "D18")
def test_push_cache_moves_a_row_of_the_chosen_layers(pusher: Pair) -> None:
    theirs = pusher.peer.call(add_rows, 6, 4, 80, seed=2)
    cache = pusher.node.rows_cache(6, 3, 64, seed=1)
    key = CacheKeyByIdAndIndex(1, theirs, 3)
    pusher.node.manager.push_cache(key, cache, 2, range(1, 3), range(2), tensor_num_per_layer=2)
    expected = make_array((6, 4, 80), 2)
    expected[:4, 3, :64] = make_array((6, 3, 64), 1)[2:, 2]
    assert np.array_equal(pusher.theirs(theirs), expected)


@pytest.mark.shows("push.does_not_fit", "error.47", "error.48")
@pytest.mark.parametrize(
    ("theirs", "src_row", "dst_row", "status"),
    [
        ((6, 4, 63), 0, 0, INVALID),  # our row does not fit theirs
        ((4, 4, 64), 0, 0, INVALID),  # they have fewer layers
        ((6, 4, 64), 3, 0, INVALID),
        ((6, 4, 64), 0, 4, GONE),
    ],
)
def test_a_push_that_does_not_fit_is_refused_and_writes_nothing(
    pusher: Pair, theirs: tuple[int, int, int], src_row: int, dst_row: int, status: LLMStatusCode
) -> None:
    cache_id = pusher.peer.call(add_rows, *theirs, seed=2)
    cache = pusher.node.rows_cache(6, 3, 64, seed=1)
    with pytest.raises(LLMException) as error:
        pusher.node.manager.push_cache(CacheKeyByIdAndIndex(1, cache_id, dst_row), cache, src_row)
    assert error.value.status_code == status
    assert np.array_equal(pusher.theirs(cache_id), make_array(theirs, 2))


@pytest.mark.shows("cm.push_cache", "O15")
def test_a_whole_row_goes_to_the_beginning_of_a_row(pusher: Pair) -> None:
    theirs = pusher.peer.call(add_rows, 6, 4, 80, seed=2)
    cache = pusher.node.rows_cache(6, 3, 64, seed=1)
    pusher.node.manager.push_cache(CacheKeyByIdAndIndex(1, theirs, 3), cache, 2)
    expected = make_array((6, 4, 80), 2)
    expected[:, 3, :64] = make_array((6, 3, 64), 1)[:, 2]
    assert np.array_equal(pusher.theirs(theirs), expected)
    pusher.peer.call(add_blocks, key=BlocksCacheKey(1, 0))
    for cache_id in (0, -1, 99):
        with pytest.raises(LLMException) as error:
            pusher.node.manager.push_cache(CacheKeyByIdAndIndex(1, cache_id), cache)
        assert status_of(error) == GONE


@pytest.mark.shows("cm.push_blocks", "D18")
@pytest.mark.parametrize(
    ("layers", "moved"),
    [
        ({"tensor_num_per_layer": 1}, (range(6), range(6))),
        ({"tensor_num_per_layer": 3}, (range(6), range(6))),
        ({"src_layer_range": range(3), "dst_layer_range": range(3)}, (range(6), range(6))),
        (
            {"src_layer_range": range(2), "dst_layer_range": range(1, 3)},
            (range(4), range(2, 6)),
        ),
        (
            {
                "src_layer_range": range(5, 6),
                "dst_layer_range": range(1),
                "tensor_num_per_layer": 1,
            },
            (range(5, 6), range(1)),
        ),
    ],
    ids=str,
)
def test_blocks_of_the_chosen_layers_are_pushed(
    pusher: Pair, layers: dict[str, Any], moved: tuple[range, range]
) -> None:
    theirs = pusher.peer.call(add_blocks, *SHAPE, seed=2, key=BlocksCacheKey(1, 0))
    cache = pusher.node.blocks_cache(*SHAPE, seed=1)
    pusher.node.manager.push_blocks(BlocksCacheKey(1, 0), cache, (1, 7), (6, 0), **layers)
    expected, (src, dst) = make_array(SHAPE, 2), moved
    for block, to in ((1, 6), (7, 0)):
        expected[list(dst), to] = make_array(SHAPE, 1)[list(src), block]
    assert np.array_equal(pusher.theirs(theirs), expected)


@pytest.mark.shows("push.does_not_fit", "O12", "error.47", "error.48")
@pytest.mark.parametrize(
    ("theirs", "src", "dst", "status"),
    [
        ((6, 8, 63), 0, 0, INVALID),
        ((6, 8, 128), 0, 0, INVALID),
        ((4, 8, 64), 0, 0, INVALID),  # they have fewer layers
        ((6, 8, 64), 8, 0, INVALID),
        ((6, 8, 64), 0, 8, INVALID),
        ((6, 8, 64), 0, -1, INVALID),
        (None, 0, 0, GONE),
    ],
)
def test_blocks_that_do_not_fit_are_not_pushed(
    pusher: Pair, theirs: tuple[int, int, int] | None, src: int, dst: int, status: LLMStatusCode
) -> None:
    shape = theirs or SHAPE
    key = BlocksCacheKey(1, 0) if theirs else None
    cache_id = pusher.peer.call(add_blocks, *shape, seed=2, key=key)
    cache = pusher.node.blocks_cache(*SHAPE, seed=1)
    with pytest.raises(LLMException) as error:
        pusher.node.manager.push_blocks(BlocksCacheKey(1, 0), cache, [src], [dst])
    assert status_of(error) == status
    assert np.array_equal(pusher.theirs(cache_id), make_array(shape, 2))


@pytest.mark.shows("error.48")
def test_a_row_is_not_pushed_into_blocks(pusher: Pair) -> None:
    theirs = pusher.peer.call(add_blocks, *SHAPE, seed=2, key=BlocksCacheKey(1, 0))
    with pytest.raises(LLMException, match="blocks cache") as error:
        pusher.node.manager.push_cache(
            CacheKeyByIdAndIndex(1, theirs), pusher.node.rows_cache(6, 1, 64)
        )
    assert status_of(error) == INVALID
    assert np.array_equal(pusher.theirs(theirs), make_array(SHAPE, 2))


@pytest.mark.shows("error.50")
@pytest.mark.parametrize("is_ours", [True, False])
def test_both_caches_of_a_push_must_be_accessible(pusher: Pair, is_ours: bool) -> None:
    rows_id = pusher.peer.call(add_rows, *SHAPE, remote_accessible=is_ours)
    blocks_id = pusher.peer.call(
        add_blocks, *SHAPE, key=BlocksCacheKey(1, 0), remote_accessible=is_ours
    )
    rows = pusher.node.rows_cache(*SHAPE, seed=1, remote_accessible=not is_ours)
    blocks = pusher.node.blocks_cache(*SHAPE, seed=1, remote_accessible=not is_ours)
    whose = "our" if is_ours else "the peer's"
    with pytest.raises(LLMException, match=f"{whose} cache . is not remote accessible") as error:
        pusher.node.manager.push_cache(CacheKeyByIdAndIndex(1, rows_id), rows)
    assert status_of(error) == INVALID
    with pytest.raises(LLMException, match=f"{whose} cache . is not remote accessible") as error:
        pusher.node.manager.push_blocks(BlocksCacheKey(1, 0), blocks, [0], [0])
    assert status_of(error) == INVALID
    assert not pusher.theirs(rows_id).any()
    assert not pusher.theirs(blocks_id).any()


@pytest.mark.shows("push.zero_layers")
def test_a_push_of_no_layers_succeeds_and_moves_nothing(pusher: Pair) -> None:
    shape = (2, 8, 64)
    blocks_id = pusher.peer.call(add_blocks, *shape, seed=2, key=BlocksCacheKey(1, 0))
    rows_id = pusher.peer.call(add_rows, *shape, seed=2)
    blocks, rows = pusher.node.blocks_cache(1, 8, 64, seed=1), pusher.node.rows_cache(*shape)
    pusher.node.manager.push_blocks(BlocksCacheKey(1, 0), blocks, [0], [0])
    key = CacheKeyByIdAndIndex(1, rows_id)
    pusher.node.manager.push_cache(key, rows, tensor_num_per_layer=3)
    assert np.array_equal(pusher.theirs(blocks_id), make_array(shape, 2))
    assert np.array_equal(pusher.theirs(rows_id), make_array(shape, 2))


@pytest.mark.shows("push.indivisible", "error.43")
def test_tensors_that_make_no_whole_layers_are_not_pushed(pusher: Pair) -> None:
    """Ten tensors in layers of three."""
    shape = (10, 4, 64)
    blocks_id = pusher.peer.call(add_blocks, *shape, seed=2, key=BlocksCacheKey(1, 0))
    rows_id = pusher.peer.call(add_rows, *shape, seed=2)
    blocks, rows = pusher.node.blocks_cache(*shape), pusher.node.rows_cache(*shape)
    with pytest.raises(LLMException, match="set tensor_num_per_layer") as error:
        pusher.node.manager.push_blocks(
            BlocksCacheKey(1, 0), blocks, [0], [0], tensor_num_per_layer=3
        )
    assert status_of(error) == INVALID
    key = CacheKeyByIdAndIndex(1, rows_id)
    with pytest.raises(LLMException, match="set tensor_num_per_layer") as error:
        pusher.node.manager.push_cache(key, rows, tensor_num_per_layer=3)
    assert status_of(error) == INVALID
    assert np.array_equal(pusher.theirs(blocks_id), make_array(shape, 2))
    assert np.array_equal(pusher.theirs(rows_id), make_array(shape, 2))


def pulled_by_key(node: Node, req_id: int) -> Bytes:
    """Run by the peer: the row that a key of ours (cluster 2) names."""
    cache = node.blocks_cache(2, 1, 64)
    node.manager.pull_blocks(CacheKey(2, req_id), cache, (), [0])
    return node.arrays[cache.cache_id][:, 0]


@pytest.mark.shows("D5")
def test_a_push_uses_no_key_up(node: Node, peer: NodeProcess, path: str) -> None:
    """Not even of a deallocated cache, which its key alone holds."""
    pool = json.dumps({"memory_size": 2 * PAGE})
    pusher = make_pair(node, peer, path, is_accessible=True, role=LLMRole.PROMPT, mem_pool_cfg=pool)
    rows_id = peer.call(add_rows, 2, 1, 64)
    manager, desc = node.manager, CacheDesc(2, [1, 64], DataType.DT_INT8)
    cache = manager.allocate_cache(desc, [CacheKey(2, 7)])
    for addr, data in zip(cache.tensor_addrs, make_array((2, 64), 1), strict=True):
        ctypes.memmove(addr, data.tobytes(), 64)
    for _ in range(2):
        manager.push_cache(CacheKeyByIdAndIndex(1, rows_id), cache)
    assert np.array_equal(pusher.theirs(rows_id)[:, 0], make_array((2, 64), 1))
    manager.deallocate_cache(cache)
    assert np.array_equal(peer.call(pulled_by_key, 7), make_array((2, 64), 1))
    with pytest.raises(LLMException) as error:
        manager.allocate_cache(desc)
    assert status_of(error) == LLMStatusCode.LLM_OUT_OF_MEMORY
    manager.remove_cache_key(CacheKey(2, 7))
    assert len(manager.allocate_cache(desc).tensor_addrs) == 2
