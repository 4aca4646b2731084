"""Transfers of more segments than are listed at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
from linked_pair import SUCCESS, Pair, add_blocks
from linking import settings_of

from llm_datadist import BlocksCacheKey, LLMRole
from llm_datadist.core.messages import MAX_REQUEST_SEGMENTS
from llm_datadist.testing.cluster import Node, NodeProcess, make_array

TENSORS, BLOCKS, NBYTES = 64, 2048, 16
SHAPE = (TENSORS, BLOCKS, NBYTES)
#: several windows for each thread, and requests over TCP
MOVED = 1 + MAX_REQUEST_SEGMENTS * 3 // 2 // TENSORS
SRC, DST = (random.Random(seed).sample(range(BLOCKS), MOVED) for seed in ("src", "dst"))


@pytest.fixture
def pair(node: Node, peer: NodeProcess, path: str) -> Pair:
    settings = settings_of(is_accessible=True, path=path) | {"sync_kv_timeout": 20_000}
    port = peer.call(Node.start, LLMRole.MIX, 1, listen_ip_info="127.0.0.1:0", **settings)
    node.start(LLMRole.MIX, 2, **settings)
    assert node.link(port, 1) == SUCCESS
    return Pair(node, peer)


def test_a_pull_of_many_segments_moves_all_and_no_more(pair: Pair) -> None:
    pair.peer.call(add_blocks, *SHAPE, seed=5, key=BlocksCacheKey(1))
    cache = pair.node.blocks_cache(*SHAPE)
    pair.node.manager.pull_blocks(BlocksCacheKey(1), cache, SRC, DST)
    expected = np.zeros(SHAPE, np.uint8)
    expected[:, DST] = make_array(SHAPE, 5)[:, SRC]
    assert np.array_equal(pair.node.arrays[cache.cache_id], expected)


def test_a_push_of_many_segments_moves_all_and_no_more(pair: Pair) -> None:
    theirs = pair.peer.call(add_blocks, *SHAPE, seed=5, key=BlocksCacheKey(1))
    cache, layers = pair.node.blocks_cache(*SHAPE, seed=7), range(TENSORS)
    pair.node.manager.push_blocks(BlocksCacheKey(1), cache, SRC, DST, layers, layers, 1)
    expected = make_array(SHAPE, 5)
    expected[:, DST] = make_array(SHAPE, 7)[:, SRC]
    assert np.array_equal(pair.theirs(theirs), expected)


def test_a_copy_of_many_segments_moves_all_and_no_more(node: Node) -> None:
    node.start(LLMRole.MIX, 2)
    cache, half = node.blocks_cache(*SHAPE, seed=7), BLOCKS // 2
    src, dst = range(half), [half + block for block in reversed(range(half))]
    node.manager.copy_blocks(cache, dict(zip(src, ([each] for each in dst), strict=True)))
    expected = make_array(SHAPE, 7)
    expected[:, dst] = expected[:, :half]
    assert np.array_equal(node.arrays[cache.cache_id], expected)
