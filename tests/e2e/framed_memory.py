"""Caches in arrays that are larger than they, with bytes around them that must stay."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cache_owner import DEVICE, PAGE

from llm_datadist import (
    Cache,
    CacheDesc,
    DataType,
    LLMRole,
    Placement,
)
from llm_datadist.testing.cluster import Bytes, Node, make_array

if TYPE_CHECKING:
    from collections.abc import Iterator


MARGIN = 40
Shape = tuple[int, int, int]


class Framed:
    """Memory for a cache [tensors, rows, bytes], with a margin around each tensor."""

    def __init__(self, shape: Shape, seed: int) -> None:
        tensors, rows, nbytes = shape
        self.shape = shape
        self.whole = make_array((tensors, MARGIN + rows * nbytes + MARGIN), seed)
        self._before = self.whole.copy()

    @property
    def addrs(self) -> list[int]:
        return [int(tensor.ctypes.data) + MARGIN for tensor in self.whole]

    @property
    def inner(self) -> Bytes:
        return self.whole[:, MARGIN:-MARGIN].reshape(self.shape)

    def desc(self, placement: Placement = DEVICE) -> CacheDesc:
        tensors, rows, nbytes = self.shape
        return CacheDesc(tensors, [rows, nbytes], DataType.DT_INT8, placement)

    def became(self, expected: Bytes) -> bool:
        """Whether the cache holds just that, and the margins what they held."""
        whole = self._before.copy()
        whole[:, MARGIN:-MARGIN] = expected.reshape(len(whole), -1)
        return bool(np.array_equal(self.whole, whole))

    def is_untouched(self) -> bool:
        return bool(np.array_equal(self.whole, self._before))


@pytest.fixture
def lone(node: Node) -> Iterator[Node]:
    """A node with pools for both placements."""
    pool = json.dumps({"memory_size": 16 * PAGE})
    node.start(LLMRole.PROMPT, 1, mem_pool_cfg=pool, host_mem_pool_cfg=pool)
    yield node
    node.stop()


def rows(node: Node, frame: Framed, placement: Placement = DEVICE) -> Cache:
    return node.manager.register_cache(frame.desc(placement), frame.addrs)


def blocks(node: Node, frame: Framed, placement: Placement = DEVICE) -> Cache:
    return node.manager.register_blocks_cache(frame.desc(placement), frame.addrs)
