"""An owner and a puller for what runs out, and how much time either may take."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array
from llm_datadist.testing.timing import takes_at_most

SUCCESS = LLMStatusCode.LLM_SUCCESS
#: what linking and pulling may end with when the system or the network gives out
GIVEN_OUT = {
    LLMStatusCode.LLM_FAILED,
    LLMStatusCode.LLM_LINK_FAILED,
    LLMStatusCode.LLM_NOT_YET_LINK,
    LLMStatusCode.LLM_TIMEOUT,
}
TIMEOUT_MS = 1000
#: large enough to be pulled over several streams
SHAPE = (4, 8, 1 << 17)
KEY = BlocksCacheKey(1, 0)


def in_time() -> Any:
    return takes_at_most(1.2 * TIMEOUT_MS / 1000 + 0.3)


def settings(path: str) -> dict[str, Any]:
    return {"transfer_path": path, "sync_kv_timeout": TIMEOUT_MS, "transfer_threads": 4}


def publish(node: Node) -> None:
    node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(0, 0))


def start_owner(process: NodeProcess, path: str, address: str = "127.0.0.1:0") -> int:
    port = process.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info=address, **settings(path))
    process.call(publish)
    return port


def start_puller(node: Node, path: str, **more: Any) -> None:
    """Cache 1 is what it pulls into."""
    node.start(LLMRole.DECODER, 2, **settings(path), **more)
    node.blocks_cache(*SHAPE)
    what_is_owned()  # made now: the first random bytes of a process open files


@cache
def what_is_owned() -> Bytes:
    return make_array(SHAPE, 1)


def pull(node: Node) -> LLMStatusCode:
    """Of all blocks, in another order. The status; success is of the right bytes."""
    array = node.arrays[1]
    array[:] = 0
    blocks = list(range(SHAPE[1]))
    try:
        node.manager.pull_blocks(KEY, node.caches[1], blocks, blocks[::-1])
    except LLMException as error:
        return error.status_code
    assert np.array_equal(array, what_is_owned()[:, ::-1])
    return SUCCESS


def descriptors(_: Node) -> int:
    return len(os.listdir("/proc/self/fd"))
