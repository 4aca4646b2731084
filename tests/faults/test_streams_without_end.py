"""A peer that attaches streams without end: bounded, and others are served."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from wire import linked_caller

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node, NodeProcess

SUCCESS = LLMStatusCode.LLM_SUCCESS
SHAPE = (2, 4, 4096)
#: so many are tried, and so many at most may be there: docs/architecture.md
TRIED, BOUND = 250, 112
SETTINGS: dict[str, Any] = {"transfer_path": "tcp", "enable_remote_cache_accessible": True}


def descriptors(_: Node) -> int:
    return len(os.listdir("/proc/self/fd"))


def publish(node: Node) -> None:
    node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(0, 0))


def test_a_peer_that_attaches_streams_without_end_is_bounded(
    node: Node, victim: NodeProcess
) -> None:
    port = victim.call(
        type(node).start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **SETTINGS
    )
    victim.call(publish)
    before = victim.call(descriptors)
    with linked_caller(port, is_remote_accessible=True) as greedy:
        refused = 0
        for count in range(TRIED):
            with suppress(EOFError):
                wire = greedy.dial()
                wire.send(m.Attach(greedy.welcome.token, count % 2 == 1))
                refused += not isinstance(wire.receive(), m.Attached)
                continue
            refused += 1
        assert refused >= TRIED - BOUND
        assert eventually(lambda: victim.call(descriptors) <= before + BOUND)
        node.start(LLMRole.DECODER, 7, **SETTINGS)
        assert node.link(port, 1) == SUCCESS
        cache, blocks = node.blocks_cache(*SHAPE), list(range(SHAPE[1]))
        node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, blocks, blocks)
    assert eventually(lambda: victim.call(descriptors) <= before + 4)
