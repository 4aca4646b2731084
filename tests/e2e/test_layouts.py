"""Caches that carry layouts: any parallelism, block size and order to any other."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest
from linked_pair import GONE, INVALID, SUCCESS
from sharded_caches import (
    HEAD_SIZE,
    HEADS,
    LAYERS,
    TOKENS,
    Shard,
    add_shard,
    blocks_of,
    has_it_all,
    is_read,
    push,
    unregister,
)

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    KVHeads,
    KVLayout,
    LLMException,
    LLMRole,
)
from llm_datadist.core import reshard
from llm_datadist.observe.log import LOGGER_NAME
from llm_datadist.testing.cluster import Node, NodeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist import Cache

ALL = KVHeads.all(HEADS)
RANKS = [KVHeads.share(HEADS, rank, 3) for rank in range(3)]
ORDERS = ("BNHD", "BHND")
KEYS = [BlocksCacheKey(cluster_id) for cluster_id in (1, 2, 3)]


@pytest.fixture(scope="module")
def processes() -> Iterator[list[NodeProcess]]:
    with ExitStack() as stack:
        yield [stack.enter_context(NodeProcess()) for _ in KEYS]


class Ranks:
    """Clusters 1 to 3 in other processes, linked to cluster 4 here."""

    def __init__(self, processes: list[NodeProcess], path: str, *, is_accessible: bool) -> None:
        self.peers = processes
        self.node = Node()
        settings: dict[str, object] = {
            "enable_remote_cache_accessible": is_accessible,
            "transfer_path": path,
        }
        try:
            self._start(settings)
        except BaseException:  # the next test must find none of it
            self.stop()
            raise

    def _start(self, settings: dict[str, object]) -> None:
        ports = [
            peer.call(Node.start, LLMRole.PROMPT, i, listen_ip_info="127.0.0.1:0", **settings)
            for i, peer in enumerate(self.peers, 1)
        ]
        self.node.start(LLMRole.DECODER, 4, **settings)
        for cluster_id, port in enumerate(ports, 1):
            assert self.node.link(port, cluster_id, 10_000) == SUCCESS

    def stop(self) -> None:
        self.node.stop()
        for peer in self.peers:
            peer.call(Node.stop)

    def hold(self, order: str, block_tokens: int) -> None:
        """Each rank has its head."""
        for peer, heads in zip(self.peers, RANKS, strict=True):
            peer.call(add_shard, order, block_tokens, heads)

    def pull(self, shard: Shard, block_tokens: int, keys: list[BlocksCacheKey] = KEYS) -> None:
        sources = {key: blocks_of(block_tokens) for key in keys}
        self.node.manager.pull_shards(sources, shard.cache, shard.blocks, tokens=TOKENS)


@pytest.fixture
def ranks(processes: list[NodeProcess], path: str, is_accessible: bool) -> Iterator[Ranks]:
    made = Ranks(processes, path, is_accessible=is_accessible)
    try:
        yield made
    finally:
        made.stop()


def test_three_ranks_with_a_head_each_fill_one_cache(ranks: Ranks) -> None:
    for order in ORDERS:
        ranks.hold(order, 4)
        for target, block_tokens in ((ORDERS[0], 8), (ORDERS[1], 3)):
            shard = Shard(ranks.node, target, block_tokens, ALL)
            ranks.pull(shard, 4)
            assert shard.has_it_all()


def test_a_rank_pulls_its_head_out_of_a_whole_cache(ranks: Ranks) -> None:
    ranks.peers[0].call(add_shard, "BNHD", 8, ALL)
    for heads in RANKS:
        shard = Shard(ranks.node, "BHND", 4, heads)
        ranks.node.manager.pull_blocks(
            KEYS[0], shard.cache, blocks_of(8), shard.blocks, tokens=TOKENS
        )
        assert shard.has_it_all()


def test_stages_with_layers_each_fill_one_cache(ranks: Ranks) -> None:
    for layer in (0, 1):
        ranks.peers[layer].call(add_shard, "BHND", 4, ALL, [layer])
    shard = Shard(ranks.node, "BHND", 8, ALL)
    ranks.pull(shard, 4, KEYS[:2])
    assert shard.has_it_all()


def test_a_push_brings_each_rank_its_head(processes: list[NodeProcess], path: str) -> None:
    ranks = Ranks(processes, path, is_accessible=True)
    try:
        whole = Shard(ranks.node, "BNHD", 8, ALL)
        whole.fill()
        for peer, key, heads in zip(ranks.peers, KEYS, RANKS, strict=True):
            peer.call(add_shard, "BHND", 4, heads, is_filled=False)
            ranks.node.manager.push_blocks(
                key, whole.cache, whole.blocks, blocks_of(4), tokens=TOKENS
            )
            assert peer.call(has_it_all)
    finally:
        ranks.stop()


def test_ranks_push_their_heads_into_one_cache_side_by_side(
    processes: list[NodeProcess], path: str
) -> None:
    ranks = Ranks(processes, path, is_accessible=True)
    try:
        key = BlocksCacheKey(4)
        for order in ORDERS:
            ranks.hold(order, 4)
            whole = Shard(ranks.node, "BNHD", 8, ALL, key=key)
            for peer in ranks.peers:
                peer.begin(push, key, whole.blocks)
            for peer in ranks.peers:
                peer.result()
            assert whole.has_it_all()
            ranks.node.manager.unregister_cache(whole.cache.cache_id)
    finally:
        ranks.stop()


def test_stages_push_their_layers_and_each_touches_nothing_else(
    processes: list[NodeProcess], path: str
) -> None:
    ranks = Ranks(processes, path, is_accessible=True)
    try:
        key = BlocksCacheKey(4)
        whole = Shard(ranks.node, "BHND", 8, ALL, key=key)
        for layer in (0, 1):
            ranks.peers[layer].call(add_shard, "BNHD", 4, RANKS[1], [layer])
            ranks.peers[layer].call(push, key, whole.blocks)
            one_head = LAYERS * TOKENS * HEAD_SIZE
            assert np.count_nonzero(whole.tensors) == (layer + 1) * one_head
        ranks.peers[2].call(add_shard, "BHND", 8, ALL, is_filled=True)
        ranks.peers[2].call(push, key, whole.blocks)
        assert whole.has_it_all()
    finally:
        ranks.stop()


def test_a_push_of_what_the_destination_does_not_hold_is_refused(
    processes: list[NodeProcess], path: str
) -> None:
    ranks = Ranks(processes, path, is_accessible=True)
    try:
        key = BlocksCacheKey(4)
        head = Shard(ranks.node, "BHND", 8, RANKS[0], [0], key=key)
        for heads, layers, words in (
            (RANKS[1], [0], "axis H.*1 to 1 of 3.*0 to 0 of 3"),
            (RANKS[0], [1], "axis L.*source has 1, the destination 0"),
        ):
            ranks.peers[0].call(add_shard, "BHND", 4, heads, layers)
            with pytest.raises(LLMException, match=words) as caught:
                ranks.peers[0].call(push, key, head.blocks)
            assert caught.value.status_code is INVALID
            ranks.peers[0].call(unregister)
        assert not head.tensors.any()
    finally:
        ranks.stop()


# -- who has read it --


def test_owners_know_when_all_readers_have_what_they_need(ranks: Ranks) -> None:
    """Also the owner of whom nothing was needed: it waits for as many."""
    for peer, heads in zip(ranks.peers, (*RANKS[:2], ALL), strict=True):
        peer.call(add_shard, "BHND", 4, heads, readers=2)
    for is_last in (False, True):
        assert not any(peer.call(is_read) for peer in ranks.peers)
        ranks.pull(Shard(ranks.node, "BHND", 8, ALL if is_last else RANKS[0]), 4)
    assert all(peer.call(is_read, 10.0) for peer in ranks.peers)


def test_a_pull_of_one_cache_counts_as_well(ranks: Ranks) -> None:
    ranks.peers[0].call(add_shard, "BHND", 8, ALL, readers=1)
    shard = Shard(ranks.node, "BHND", 8, ALL)
    ranks.node.manager.pull_blocks(KEYS[0], shard.cache, shard.blocks, shard.blocks)
    assert ranks.peers[0].call(is_read, 10.0)


def test_a_reader_that_failed_is_not_counted(ranks: Ranks) -> None:
    for peer, heads in zip(ranks.peers, RANKS, strict=True):
        peer.call(add_shard, "BHND", 4, heads, readers=1)
    ranks.peers[2].call(unregister)
    with pytest.raises(LLMException):
        ranks.pull(Shard(ranks.node, "BHND", 8, ALL), 4)
    assert not any(peer.call(is_read) for peer in ranks.peers[:2])


def test_to_wait_for_readers_of_what_is_not_there_is_an_error(ranks: Ranks) -> None:
    shard = Shard(ranks.node, "BHND", 8, ALL)
    ranks.node.manager.unregister_cache(shard.cache.cache_id)
    with pytest.raises(LLMException) as caught:
        ranks.node.manager.wait_for_readers(shard.cache, 0)
    assert caught.value.status_code is GONE


# -- what is refused, and what is left behind then --


def test_what_no_rank_holds_is_refused_and_nothing_is_touched(ranks: Ranks) -> None:
    ranks.hold("BHND", 4)
    shard = Shard(ranks.node, "BHND", 8, ALL)
    with pytest.raises(LLMException, match=r"axis H.*head 2 of 3") as caught:
        ranks.pull(shard, 4, KEYS[:2])
    assert caught.value.status_code is INVALID
    assert not shard.tensors.any()


def test_one_rank_that_lets_go_fails_the_whole_pull(ranks: Ranks) -> None:
    ranks.hold("BHND", 4)
    shard = Shard(ranks.node, "BHND", 8, ALL)
    ranks.pull(shard, 4)
    ranks.peers[1].call(unregister)
    other = Shard(ranks.node, "BHND", 8, ALL)
    with pytest.raises(LLMException) as caught:
        ranks.pull(other, 4)
    assert caught.value.status_code is GONE
    untouched = [block for block in range(24) if block not in other.blocks]
    assert not other.tensors[:, untouched].any()


def test_a_cache_that_is_made_anew_with_another_layout_is_looked_up_anew(ranks: Ranks) -> None:
    ranks.hold("BHND", 4)
    ranks.pull(Shard(ranks.node, "BHND", 8, ALL), 4)
    ranks.peers[2].call(unregister)
    ranks.peers[2].call(add_shard, "BNHD", 8, RANKS[2])
    shard = Shard(ranks.node, "BHND", 8, ALL)
    sources = {KEYS[0]: blocks_of(4), KEYS[1]: blocks_of(4), KEYS[2]: blocks_of(8)}
    ranks.node.manager.pull_shards(sources, shard.cache, shard.blocks, tokens=TOKENS)
    assert shard.has_it_all()


def test_a_cache_without_a_layout_is_refused(ranks: Ranks) -> None:
    ranks.peers[0].call(Node.add_blocks, key=KEYS[0])
    shard = Shard(ranks.node, "BHND", 8, ALL)
    with pytest.raises(LLMException, match="no layout") as caught:
        ranks.pull(shard, 8, KEYS[:1])
    assert caught.value.status_code is INVALID
    plain = ranks.node.blocks_cache()
    with pytest.raises(LLMException, match="no layout"):
        ranks.node.manager.pull_shards({KEYS[0]: [1]}, plain, [1])
    with pytest.raises(LLMException, match="tokens"):
        ranks.node.manager.pull_blocks(KEYS[0], plain, [1], [1], tokens=3)


def test_layouts_that_differ_are_not_moved_by_layer_ranges(ranks: Ranks) -> None:
    ranks.peers[0].call(add_shard, "BNHD", 8, ALL)
    unlike, alike = (Shard(ranks.node, order, 8, ALL) for order in ("BHND", "BNHD"))
    lists = alike.blocks, alike.blocks
    keywords = {"src_layer_range": range(1), "dst_layer_range": range(1)}
    with pytest.raises(LLMException, match="layer ranges"):
        ranks.node.manager.pull_blocks(KEYS[0], unlike.cache, *lists, **keywords)
    ranks.node.manager.pull_blocks(KEYS[0], alike.cache, *lists, **keywords)
    assert alike.tensors[:2].any()
    assert not alike.tensors[2:].any()


# -- many pieces --


def test_as_many_pieces_as_fill_many_system_calls_arrive(ranks: Ranks) -> None:
    """A piece for each head and token, whose source is contiguous, or has others between them."""
    tokens = 2085
    for peer, heads in zip(ranks.peers, RANKS, strict=True):
        peer.call(add_shard, "BNHD", 16, heads, tokens=tokens)
    whole = Shard(ranks.node, "BNHD", 64, ALL, tokens=tokens)
    sources = {key: blocks_of(16, tokens) for key in KEYS}
    ranks.node.manager.pull_shards(sources, whole.cache, whole.blocks, tokens=tokens)
    assert whole.has_it_all()
    ranks.peers[0].call(unregister)
    ranks.peers[0].call(add_shard, "BNHD", 16, ALL, tokens=tokens)
    for order in ORDERS:
        head = Shard(ranks.node, order, 64, RANKS[1], tokens=tokens)
        ranks.node.manager.pull_blocks(
            KEYS[0], head.cache, blocks_of(16, tokens), head.blocks, tokens=tokens
        )
        assert head.has_it_all()


def unmapped_shard(node: Node, heads: KVHeads) -> Cache:
    """At addresses that no program has."""
    desc = CacheDesc(4, [24, 8, heads.count, 5], DataType.DT_INT32)
    layout, key = KVLayout.of(desc, "NHD", heads=heads), BlocksCacheKey(node.datadist.cluster_id)
    return node.manager.register_blocks_cache(desc, [0x1000] * 4, key, layout=layout)


def add_unmapped_shard(node: Node, heads: KVHeads) -> None:
    unmapped_shard(node, heads)


def test_small_pieces_of_unmapped_memory_are_refused_by_address(ranks: Ranks) -> None:
    ranks.peers[0].call(add_unmapped_shard, ALL)
    ranks.peers[1].call(add_shard, "BNHD", 8, ALL)
    ours = Shard(ranks.node, "BNHD", 8, RANKS[1])
    with pytest.raises(LLMException, match=r"remote address.*not mapped") as caught:
        ranks.node.manager.pull_blocks(KEYS[0], ours.cache, ours.blocks, ours.blocks)
    assert caught.value.status_code is INVALID
    unmapped = unmapped_shard(ranks.node, RANKS[1])
    with pytest.raises(LLMException, match=r"local address.*not mapped") as caught:
        ranks.node.manager.pull_blocks(KEYS[1], unmapped, ours.blocks, ours.blocks)
    assert caught.value.status_code is INVALID
    ranks.node.manager.pull_blocks(KEYS[1], ours.cache, ours.blocks, ours.blocks, tokens=TOKENS)
    assert ours.has_it_all()


def test_a_large_plan_is_moved_by_windows_and_crumbs_are_warned_of_once(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reshard, "MOST_SEGMENTS", 50)
    ranks.peers[0].call(add_shard, "BNHD", 8, ALL)
    with caplog.at_level(logging.WARNING, LOGGER_NAME):
        for _ in range(2):
            shard = Shard(ranks.node, "BHND", 4, RANKS[1])
            ranks.node.manager.pull_blocks(
                KEYS[0], shard.cache, blocks_of(8), shard.blocks, tokens=TOKENS
            )
            assert shard.has_it_all()
    told = [record.message for record in caplog.records if "pieces" in record.message]
    assert [f"{4 * TOKENS} pieces of 20 bytes" in message for message in told] == [True]
