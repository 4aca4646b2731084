"""A program that ends behind `transfer_cache_async`: its transfer comes to its end first (6.12)."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, LLMRole
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from programs import environment

SHAPE = (4, 2, 4096)

PROGRAM = """
import sys, threading
from llm_datadist import *
from llm_datadist.testing.cluster import Node

class WhenMainHasEnded(LayerSynchronizer):
    def synchronize_layer(self, layer_index, timeout_in_millis):
        threading.main_thread().join(10)
        return True

node = Node()
node.start(LLMRole.PROMPT, 2, enable_remote_cache_accessible=True, transfer_path=sys.argv[2])
assert node.link(int(sys.argv[1]), 1) == LLMStatusCode.LLM_SUCCESS
cache = node.blocks_cache(*map(int, sys.argv[3:]), seed=5)
config = TransferWithCacheKeyConfig(BlocksCacheKey(1, 0), range(2), range(2))
node.manager.transfer_cache_async(cache, WhenMainHasEnded(), [config], [0, 1], [0, 1])
"""


@pytest.mark.parametrize("path", ["cma", "tcp"])
def test_a_program_that_ends_has_sent_its_layers(peer: NodeProcess, path: str) -> None:
    port = peer.call(
        Node.start, LLMRole.DECODER, 1, listen_ip_info="127.0.0.1:0",
        enable_remote_cache_accessible=True, transfer_path=path,
    )  # fmt: skip
    cache_id = peer.call(Node.add_blocks, *SHAPE, key=BlocksCacheKey(1, 0))
    command = [sys.executable, "-c", PROGRAM, str(port), path, *map(str, SHAPE)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert (ended.returncode, ended.stderr) == (0, "")
    np.testing.assert_array_equal(peer.call(Node.array_of, cache_id), make_array(SHAPE, 5))
