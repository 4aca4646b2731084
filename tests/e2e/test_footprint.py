"""A large pull needs hardly any memory besides the caches, on either side."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess

KEY = BlocksCacheKey(1, 0)
NUM_TENSORS, NUM_BLOCKS, BLOCK_NBYTES = 64, 256, 32 * 1024
MOST_NBYTES = 8 * 1024 * 1024


def peak_nbytes(_: Node) -> int:
    """The most memory that this process ever had, since it was last forgotten."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def forget_peak(node: Node) -> int:
    """What the process has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_nbytes(node)


def own(node: Node) -> None:
    cache = node.blocks_cache(NUM_TENSORS, NUM_BLOCKS, BLOCK_NBYTES, key=KEY)
    node.arrays[cache.cache_id][:] = 7


@pytest.mark.slow
def test_a_pull_of_512_mib_takes_less_than_8_mib(
    node: Node, victim: NodeProcess, path: str, is_accessible: bool
) -> None:
    settings = {"transfer_path": path, "enable_remote_cache_accessible": is_accessible}
    settings["sync_kv_timeout"] = 60_000
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    victim.call(own)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
    cache = node.blocks_cache(NUM_TENSORS, NUM_BLOCKS, BLOCK_NBYTES)
    array = node.arrays[cache.cache_id]
    array[:] = 1  # its pages are the cache's, not the pull's
    every = list(range(NUM_BLOCKS))
    scattered = every[::2] + every[1::2]
    node.manager.pull_blocks(KEY, cache, every[:1], every[:1])
    mine, theirs = forget_peak(node), victim.call(forget_peak)
    node.manager.pull_blocks(KEY, cache, scattered, every)
    assert peak_nbytes(node) - mine < MOST_NBYTES
    assert victim.call(peak_nbytes) - theirs < MOST_NBYTES
    assert (array == 7).all()
