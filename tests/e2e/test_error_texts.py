"""The words of the most common failures: which peer, which cache, what to do. Spec 12, line 19."""

from __future__ import annotations

import logging
import re
import socket
from typing import TYPE_CHECKING, Any

import linked_pair
import pytest
from linked_pair import (
    GONE,
    INVALID,
    NOT_LINKED,
    Pair,
    add_blocks,
    add_rows,
    status_of,
    unregister,
)

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMException,
    LLMRole,
    LLMStatusCode,
)

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

pair = linked_pair.pair
pusher = linked_pair.pusher

pytestmark = pytest.mark.shows("error.texts", "relies.19")

OF_BLOCKS = r"pull_blocks of BlocksCacheKey\(cluster_id=1, model_id=0\) into cache 1: "
OF_ROW = r"pull_cache of CacheKeyByIdAndIndex\(cluster_id=1, cache_id={}, .*\) into cache 2: "
KEEP = "it must register or allocate one, and keep it while it is used"


def says(text: str, status: LLMStatusCode, call: Any, *args: Any) -> None:
    with pytest.raises(LLMException, match=f"^{text}$") as error:
        call(*args)
    assert status_of(error) == status


@pytest.fixture
def puller(pair: Pair) -> Pair:
    """With a blocks cache 1 and a cache 2 of rows of 256 bytes."""
    pair.node.blocks_cache()
    pair.node.rows_cache()
    return pair


def pull_blocks(pair: Pair, dst_block: int = 0) -> None:
    cache = pair.node.caches[1]
    pair.node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0], [dst_block])


def pull_row(pair: Pair, cache_id: int) -> None:
    key = CacheKeyByIdAndIndex(1, cache_id)
    pair.node.manager.pull_cache(key, pair.node.caches[2])


def test_a_key_that_nobody_bound(puller: Pair) -> None:
    text = f"the peer has no cache with that key: {KEEP}"
    says(OF_BLOCKS + text, GONE, pull_blocks, puller)
    row = r"pull_blocks of CacheKey\(cluster_id=1, req_id=7, .*model_id=3\) into cache 1: "
    pull = puller.node.manager.pull_blocks
    says(row + text, GONE, pull, CacheKey(1, 7, 3), puller.node.caches[1], (), [0])


def test_a_cache_that_was_freed(puller: Pair) -> None:
    cache_id = puller.peer.call(add_rows)
    pull_row(puller, cache_id)
    puller.peer.call(unregister, cache_id)
    text = f"the peer has no cache {cache_id}: {KEEP}"
    says(OF_ROW.format(cache_id) + text, GONE, pull_row, puller, cache_id)


def test_a_row_that_is_not_there(puller: Pair) -> None:
    cache_id = puller.peer.call(add_rows)
    key, pull = CacheKeyByIdAndIndex(1, cache_id, 4), puller.node.manager.pull_cache
    text = f"the peer's cache {cache_id} has no row 4, but 4"
    says(OF_ROW.format(cache_id) + text, GONE, pull, key, puller.node.caches[2])


def test_our_own_cache_that_was_freed(puller: Pair) -> None:
    puller.node.manager.unregister_cache(2)
    text = "there is no cache 2 here: it was unregistered or freed, or never was"
    says(OF_ROW.format(1) + text, GONE, pull_row, puller, 1)


def test_rows_that_differ_in_size(puller: Pair) -> None:
    cache_id = puller.peer.call(add_rows, 2, 4, 200)
    text = "256 bytes are more than the source's rows have behind offset 0, 200: "
    hint = "make those rows as large, or size smaller"
    says(OF_ROW.format(cache_id) + text + hint, INVALID, pull_row, puller, cache_id)


def test_blocks_that_differ_in_size(puller: Pair) -> None:
    puller.peer.call(add_blocks, 2, 8, 32, key=BlocksCacheKey(1, 0))
    text = "source blocks have 32 bytes, destination blocks 64"
    says(OF_BLOCKS + text, INVALID, pull_blocks, puller)


def test_tensors_that_differ_in_number(puller: Pair) -> None:
    puller.peer.call(add_blocks, 3, 8, 64, key=BlocksCacheKey(1, 0))
    text = "3 remote tensors for 2 local ones: give layer ranges of equal length"
    says(OF_BLOCKS + text, INVALID, pull_blocks, puller)


def test_a_block_out_of_range(puller: Pair) -> None:
    puller.peer.call(add_blocks, key=BlocksCacheKey(1, 0))
    text = "block indices 8 to 8 are out of range: the destination has 8 blocks"
    says(OF_BLOCKS + text, INVALID, pull_blocks, puller, 8)


def test_a_cache_that_is_not_accessible(puller: Pair) -> None:
    cache_id = puller.peer.call(add_blocks, key=BlocksCacheKey(1, 0), remote_accessible=False)
    text = f"the peer's cache {cache_id} is not remote accessible: "
    hint = "its owner must register it with remote_accessible=True"
    says(OF_BLOCKS + text + hint, INVALID, pull_blocks, puller)


def test_a_link_that_is_not_there(node: Node) -> None:
    node.start(LLMRole.DECODER, 2)
    text = "cluster 2 is not linked to cluster 1; call link_clusters first"
    pull, cache = node.manager.pull_blocks, node.blocks_cache()
    says(OF_BLOCKS + text, NOT_LINKED, pull, BlocksCacheKey(1, 0), cache, [0], [0])


def test_a_push(pusher: Pair) -> None:
    pushed, cache = pusher.node.manager.push_blocks, pusher.node.blocks_cache()
    call = r"push_blocks of cache 1 to BlocksCacheKey\(cluster_id={}, model_id=0\): "
    missing = f"the peer has no cache with that key: {KEEP}"
    says(call.format(1) + missing, GONE, pushed, BlocksCacheKey(1, 0), cache, [0], [0])
    alone = "cluster 2 is not linked to cluster 9; call link_clusters first"
    says(call.format(9) + alone, NOT_LINKED, pushed, BlocksCacheKey(9, 0), cache, [0], [0])
    pusher.peer.call(add_blocks, key=BlocksCacheKey(1, 0))
    outside = "block indices 8 to 8 are out of range: the destination has 8 blocks"
    says(call.format(1) + outside, INVALID, pushed, BlocksCacheKey(1, 0), cache, [0], [8])


def test_a_link_to_where_nobody_listens(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.start(LLMRole.DECODER, 2)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and not listened to
        port = bound.getsockname()[1]
        with caplog.at_level(logging.ERROR, "LLM_DATADIST"):
            assert node.link(port, 1) == LLMStatusCode.LLM_LINK_FAILED
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        rf"cluster 2 could not link .*remote_cluster_id=1, 127.0.0.1:{port}\): cannot connect to "
        rf"127.0.0.1:{port}: Connect.*; the peer must listen there .*LINK_FAILED\)",
        line,
    )
