"""Nobody polls: a linked pair that does nothing leaves the CPUs to others. Decision O35."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, make_array

SHAPE = (2, 8, 1 << 16)
IDLE_S = 10.0
#: one thread that looks every hundredth of a second takes twice as much
MOST_CPU_S = 0.05


def cpu_of_doing_nothing(node: Node) -> float:
    """The CPU seconds of all threads of this process while nobody asks for anything."""
    begun = time.process_time()
    threading.Event().wait(IDLE_S)
    return time.process_time() - begun


def own(node: Node) -> None:
    node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(0, 0))


def pulls(node: Node, cluster_id: int) -> bool:
    cache, blocks = node.blocks_cache(*SHAPE), list(range(SHAPE[1]))
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, blocks, blocks)
    return np.array_equal(node.arrays[cache.cache_id], make_array(SHAPE, 1))


def link_ranks(node: Node, name: str, first_id: int) -> int:
    """Waits for a third member, which never comes."""
    ranks = {first_id: 0, first_id + 1: 1, 99: 2}
    return node.datadist.link(name, ranks, '{"server_list":[{"device":[{}]}]}')


def start_and_link(
    stack: ExitStack, first_id: int, *, is_accessible: bool, path: str
) -> tuple[NodeProcess, NodeProcess]:
    """An owner and its caller, whose streams have been used in both directions."""
    settings: dict[str, Any] = {
        "enable_remote_cache_accessible": is_accessible,
        "transfer_path": path,
    }
    owner, caller = (stack.enter_context(NodeProcess()) for _ in range(2))
    listen = "127.0.0.1:0"
    port = owner.call(Node.start, LLMRole.PROMPT, first_id, listen_ip_info=listen, **settings)
    caller.call(Node.start, LLMRole.DECODER, first_id + 1, **settings)
    for process in (owner, caller):
        process.call(own)
    assert caller.call(Node.link, port, first_id) == LLMStatusCode.LLM_SUCCESS
    assert caller.call(pulls, first_id)
    assert owner.call(pulls, first_id + 1)
    return owner, caller


@pytest.mark.slow
@pytest.mark.shows("O35")
def test_linked_pairs_that_do_nothing_take_no_cpu() -> None:
    """Two pairs side by side, each on a path of its own; rank-table links are waited for."""
    with ExitStack() as stack:
        pairs = [
            start_and_link(stack, 1, is_accessible=True, path="cma"),
            start_and_link(stack, 3, is_accessible=False, path="tcp"),
        ]
        for first_id, pair in zip((1, 3), pairs, strict=True):
            for process in pair:
                process.call(link_ranks, f"idle-{pair[0].pid}", first_id)
        for pair in pairs:
            for process in pair:
                process.begin(cpu_of_doing_nothing)
        for pair in pairs:
            for process in pair:
                seconds = process.result()
                assert isinstance(seconds, float)
                assert seconds <= MOST_CPU_S
        for first_id, (_, caller) in zip((1, 3), pairs, strict=True):
            assert caller.call(pulls, first_id)
