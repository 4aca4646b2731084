"""Nobody polls: a linked pair that does nothing leaves the CPUs to others. Decision O35."""

from __future__ import annotations

import threading
import time
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


def link_ranks(node: Node, name: str) -> int:
    return node.datadist.link(name, {1: 0, 2: 1, 3: 2}, '{"server_list":[{"device":[{}]}]}')


@pytest.mark.slow
@pytest.mark.shows("O35")
@pytest.mark.parametrize(("is_accessible", "path"), [(True, "cma"), (False, "tcp")])
def test_a_linked_pair_that_does_nothing_takes_no_cpu(
    victim: NodeProcess, is_accessible: bool, path: str
) -> None:
    """Its streams were used before, and a rank-table link is waited for."""
    settings: dict[str, Any] = {
        "enable_remote_cache_accessible": is_accessible,
        "transfer_path": path,
    }
    with NodeProcess() as caller:
        port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
        caller.call(Node.start, LLMRole.DECODER, 2, **settings)
        for process in (victim, caller):
            process.call(own)
        assert caller.call(Node.link, port, 1) == LLMStatusCode.LLM_SUCCESS
        assert caller.call(pulls, 1)
        assert victim.call(pulls, 2)
        for process in (victim, caller):
            process.call(link_ranks, f"idle-{victim.pid}")
            process.begin(cpu_of_doing_nothing)
        for process in (victim, caller):
            seconds = process.result()
            assert isinstance(seconds, float)
            assert seconds <= MOST_CPU_S
        assert caller.call(pulls, 1)
