"""`verify_transfers`: what arrived is compared, by checksum, with what its owner has."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import linked_pair
import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.faults import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Iterator

SUCCESS = LLMStatusCode.LLM_SUCCESS
KEY = BlocksCacheKey(1, 0)
SHAPE = (8, 64, 32 * 1024)

pytest.importorskip("xxhash", reason="the extra `integrity` is not installed")


def start(node: Node, peer: NodeProcess, **settings: Any) -> int:
    """Two clusters that verify; the other one has the blocks."""
    settings = {"verify_transfers": True, "sync_kv_timeout": 5000, **settings}
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    peer.call(linked_pair.add_blocks, *SHAPE, seed=1, key=KEY)
    node.start(LLMRole.DECODER, 2, **settings)
    return port


def test_what_is_moved_is_verified_and_arrives(
    node: Node, peer: NodeProcess, path: str, is_accessible: bool
) -> None:
    port = start(node, peer, transfer_path=path, enable_remote_cache_accessible=is_accessible)
    assert node.link(port, 1) == SUCCESS
    cache = node.blocks_cache(*SHAPE)
    blocks = list(range(64))
    node.manager.pull_blocks(KEY, cache, blocks[::-1], blocks)
    np.testing.assert_array_equal(node.arrays[cache.cache_id], make_array(SHAPE, 1)[:, ::-1])


def test_what_is_pushed_is_verified_and_arrives(node: Node, peer: NodeProcess, path: str) -> None:
    port = start(node, peer, transfer_path=path, enable_remote_cache_accessible=True)
    row_id = peer.call(linked_pair.add_rows, 2, 3, 4096)
    assert node.link(port, 1) == SUCCESS
    rows = node.rows_cache(2, 3, 4096, seed=5)
    node.manager.push_cache(CacheKeyByIdAndIndex(1, row_id, 2), rows, 1)
    theirs = peer.call(linked_pair.array_of, row_id)
    np.testing.assert_array_equal(theirs[:, 2], make_array((2, 3, 4096), 5)[:, 1])


@pytest.fixture
def proxy(node: Node, peer: NodeProcess) -> Iterator[FaultProxy]:
    with FaultProxy(start(node, peer, transfer_path="tcp")) as proxy:
        assert node.link(proxy.port, 1) == SUCCESS
        yield proxy


def test_a_bit_that_flips_on_the_way_is_an_error(node: Node, proxy: FaultProxy) -> None:
    cache = node.blocks_cache(*SHAPE)
    array, source = node.arrays[cache.cache_id], make_array(SHAPE, 1)
    node.manager.pull_blocks(KEY, cache, [0], [1])
    proxy.corrupt(after_nbytes=100_000)  # well within the data of the next pull
    with pytest.raises(LLMException, match="checksums differ") as error:
        node.manager.pull_blocks(KEY, cache, [2, 3], [4, 6])
    assert error.value.status_code == LLMStatusCode.LLM_FAILED
    others = [block for block in range(64) if block not in (1, 4, 6)]
    assert not array[:, others].any()
    proxy.restore()
    node.manager.pull_blocks(KEY, cache, [2, 3], [4, 6])
    np.testing.assert_array_equal(array[:, [1, 4, 6]], source[:, [0, 2, 3]])


def test_without_the_package_the_option_is_refused() -> None:
    program = """
import sys
sys.modules["xxhash"] = None
from llm_datadist import *
config = LLMConfig()
config.enable_cache_manager = config.verify_transfers = True
try:
    LLMDataDist(LLMRole.PROMPT, 1).init(config.generate_options())
except LLMException as error:
    print(error.status_code, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert "LLM_FEATURE_NOT_ENABLED" in done.stdout
    assert "pip install" in done.stdout
