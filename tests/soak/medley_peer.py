"""What `medley` and its peers share, and what the peers run."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import numpy as np

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, make_array

SUCCESS = LLMStatusCode.LLM_SUCCESS
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
#: what a transfer may meet while other threads unlink
MOVING = {SUCCESS, NOT_LINKED, TIMEOUT}

BLOCKS, ROWS = (4, 32, 512), (4, 8, 1024)
#: models: what a cluster offers, and where the others push to
OFFERED, TARGET = 1, 3
ROWS_ID, TARGET_ROWS_ID = 2, 4
MINE = (4, 8, 512)


class Notes:
    """What all threads found. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.worst_over_s = float("-inf")

    def add(self, operation: str, status: LLMStatusCode, over_s: float) -> None:
        with self._lock:
            self.counts[f"{operation} {status.name}"] += 1
            self.worst_over_s = max(self.worst_over_s, over_s)

    def complain(self, what: str) -> None:
        with self._lock:
            if len(self.wrong) < 20:
                self.wrong.append(what)


# -- run by the peers --


def serve(node: Node, cluster_id: int, threads: int, path: str, settings: dict[str, Any]) -> int:
    """A listener with something to pull, and a place to push to for each thread; its port."""
    port = node.start(
        LLMRole.MIX, cluster_id, listen_ip_info="127.0.0.1:0", transfer_path=path, **settings
    )
    offer(node)
    node.blocks_cache(MINE[0], 2 * threads, MINE[2], key=BlocksCacheKey(0, TARGET))
    node.rows_cache(ROWS[0], threads, ROWS[2])
    return port


def offer(node: Node) -> None:
    """Caches 1 and 2 of every cluster."""
    cluster_id = node.datadist.cluster_id
    node.blocks_cache(*BLOCKS, seed=cluster_id, key=BlocksCacheKey(0, OFFERED))
    node.rows_cache(*ROWS, seed=100 + cluster_id)


def pull_until(node: Node, end: float, seed: int) -> tuple[int, list[str]]:
    """Pulls from cluster 3 over the links that it made; how often rightly, and what was wrong."""
    rng = np.random.default_rng(seed)
    source = make_array(BLOCKS, 3)
    cache = node.blocks_cache(*BLOCKS)
    array, right, pace = node.arrays[cache.cache_id], 0, threading.Event()
    while time.monotonic() < end:
        src, dst = (rng.permutation(BLOCKS[1])[:8].tolist() for _ in range(2))
        array[:] = 0
        try:
            node.manager.pull_blocks(BlocksCacheKey(3, OFFERED), cache, src, dst)
        except LLMException as error:
            if error.status_code not in MOVING:
                return right, [f"pull from cluster 3: {error}"]
        else:
            expected = np.zeros_like(array)
            expected[:, dst] = source[:, src]
            if not np.array_equal(array, expected):
                return right, ["a pull from cluster 3 brought other bytes"]
            right += 1
        pace.wait(0.001)
    return right, []
