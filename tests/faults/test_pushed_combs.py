"""Combs that a linked peer makes up: none reaches beyond the cache, none ends what others do."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from wire import LinkedCaller, columns, linked_caller

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

SUCCESS, INVALID = LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_PARAM_INVALID
#: two tensors of eight blocks of 4 KiB
BLOCK = 4096
SHAPE = (2, 8, BLOCK)
#: the id of peers made by hand
MADE_UP = 4242
SOON_S = 2.0
KEY = BlocksCacheKey(1, 0)
SETTINGS: dict[str, Any] = {
    "transfer_path": "tcp",
    "sync_kv_timeout": 20_000,
    "enable_remote_cache_accessible": True,
}


def own(node: Node) -> None:
    node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(0, 0))


def cut(node: Node) -> None:
    node.datadist.unlink_clusters([cluster_info(1, MADE_UP)], 1000, True)


@pytest.fixture
def made_up(node: Node, victim: NodeProcess) -> Iterator[LinkedCaller]:
    """A peer of an owner in another process, to which a node here is linked, too."""
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **SETTINGS)
    victim.call(own)
    node.start(LLMRole.DECODER, 7, **SETTINGS)
    assert node.link(port, 1) == SUCCESS
    with linked_caller(port, is_remote_accessible=True) as made_up:
        yield made_up


def the_cache(peer: LinkedCaller) -> tuple[m.CacheInfo, list[int]]:
    stream = peer.attach()
    stream.send(m.Resolve(None, 2**64 - 1, 0, False))
    info = stream.expect(m.Resolved).info
    return info, np.frombuffer(info.addrs, dtype="<u8").tolist()


def combs(info: m.CacheInfo, place: int, offsets: list[int], nbytes: int = 8) -> m.Fetch:
    """One comb, whose teeth are side by side in memory of the peer that has nothing there."""
    teeth = columns([(nbytes * index, offset) for index, offset in enumerate(offsets)])
    return m.Fetch(
        info.cache_id, info.generation, 1, 1, 8, 600_000, 1e11, columns([(0x1000, place)]),
        teeth, nbytes,
    )  # fmt: skip


REACHES = {
    "before": (-8, [0, 8]),
    "from-before": (-1, [0, 8]),
    "behind": (8 * BLOCK, [0, 8]),
    "over-the-end": (8 * BLOCK - 15, [0, 8]),
    "one-tooth-far-away": (0, [0, 2**62]),
    "back-to-where-it-wraps": (2**63, [0, 2**63 - 8]),
    "lower-teeth": (8, [8 * BLOCK, 0]),
}


@pytest.mark.parametrize("name", REACHES)
def test_a_comb_beyond_the_cache_is_refused(made_up: LinkedCaller, name: str) -> None:
    info, addrs = the_cache(made_up)
    place, offsets = REACHES[name]
    stream = made_up.attach()
    stream.send(combs(info, (max(addrs) + place) % 2**64, offsets))
    refused = stream.expect(m.Refused)
    assert refused.status == INVALID
    assert "beyond the tensors" in refused.message


def test_a_comb_over_two_tensors_is_refused(made_up: LinkedCaller) -> None:
    info, addrs = the_cache(made_up)
    stream = made_up.attach()
    stream.send(combs(info, min(addrs), [0, max(addrs) - min(addrs)]))
    assert stream.expect(m.Refused).status == INVALID


def test_combs_of_more_than_the_cache_holds_are_refused(made_up: LinkedCaller) -> None:
    info, addrs = the_cache(made_up)
    stream = made_up.attach()
    count = SHAPE[0] * SHAPE[1] + 1
    stream.send(
        m.Fetch(
            info.cache_id, info.generation, 1, 1, 8, 600_000, 1e11,
            columns([(0x1000, addrs[0])] * count), columns([(0, 0), (BLOCK // 2, BLOCK // 2)]),
            BLOCK // 2,
        )
    )  # fmt: skip
    refused = stream.expect(m.Refused)
    assert refused.status == INVALID
    assert "more bytes than cache" in refused.message


def test_combs_that_no_plan_makes_end_their_stream_alone(made_up: LinkedCaller, node: Node) -> None:
    info, addrs = the_cache(made_up)
    for offsets, nbytes in (([0, 4], 8), ([0, 2**63], 8), ([0, 0], 8), ([], 8), ([0, 8], 2**18)):
        stream = made_up.attach()
        stream.send(combs(info, addrs[0], offsets, nbytes))
        assert stream.is_ended()
    mine = node.blocks_cache(*SHAPE, seed=9)
    with takes_at_most(SOON_S):
        node.manager.push_blocks(KEY, mine, [3], [5])


def test_a_push_waits_for_teeth_in_its_way_and_for_no_others(
    made_up: LinkedCaller, node: Node, victim: NodeProcess
) -> None:
    """The teeth are in blocks 3 and 6; the owner reads them over a stream that does not answer."""
    info, addrs = the_cache(made_up)
    stream = made_up.attach()
    stream.send(combs(info, addrs[0] + 3 * BLOCK, [16, 3 * BLOCK + 16]))
    made_up.attach(is_reverse=True)  # by which the owner asks
    mine = node.blocks_cache(*SHAPE, seed=9)
    waiting = threading.Thread(target=node.manager.push_blocks, args=(KEY, mine, [3], [6]))
    with takes_at_most(SOON_S):
        node.manager.push_blocks(KEY, mine, [3], [5])
    waiting.start()
    with takes_at_most(SOON_S):
        node.manager.push_blocks(KEY, mine, [4], [4])
    assert waiting.is_alive()
    victim.call(cut)
    waiting.join(SOON_S)
    assert not waiting.is_alive()
