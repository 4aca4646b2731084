"""An owner of caches in another process, a puller here, and what the owner runs.

Memory that was freed shows by being allocated again: the owner's pool has room for exactly one
cache of the tests.
"""

from __future__ import annotations

import ctypes
import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PAGE = 65536
NO_ID = 2**64 - 1
SUCCESS = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
GONE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NO_MEMORY = LLMStatusCode.LLM_OUT_OF_MEMORY
NOT_ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
HOST, DEVICE = Placement.HOST, Placement.DEVICE
PLACEHOLDER = CacheKey(0, NO_ID)
#: rows of 96 bytes, four tensors: a page for each
SHAPE = (4, 3, 96)
WHOLE_POOL = 4 * PAGE


def pool(nbytes: int, **fields: int) -> str:
    return json.dumps({"memory_size": nbytes, **fields})


def desc_of(
    shape: tuple[int, ...], placement: Placement = DEVICE, data_type: DataType = DataType.DT_INT8
) -> CacheDesc:
    num_tensors, *dims = shape
    return CacheDesc(num_tensors, dims, data_type, placement)


def contents(addr: int, nbytes: int) -> Bytes:
    """The memory at an address: no copy."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(addr))


def view(cache: Cache) -> list[Bytes]:
    return [contents(addr, cache.cache_desc.size) for addr in cache.tensor_addrs]


def bytes_of(cache: Cache) -> Bytes:
    return np.stack(view(cache)).reshape(cache.cache_desc.num_tensors, *cache.cache_desc.shape)


def fill(cache: Cache, seed: int) -> None:
    shape = (cache.cache_desc.num_tensors, cache.cache_desc.size)
    for tensor, data in zip(view(cache), make_array(shape, seed), strict=True):
        tensor[:] = data


def status_of(call: Callable[..., object], *args: Any, **kwargs: Any) -> LLMStatusCode:
    try:
        call(*args, **kwargs)
    except LLMException as error:
        return error.status_code
    return SUCCESS


def starts(node: Node, **settings: Any) -> Node:
    node.start(LLMRole.PROMPT, 1, **settings)
    return node


# -- run by the owner ------------------------------------------------------------------------------


def allocate(
    node: Node,
    keys: Sequence[CacheKey] = (),
    seed: int = 1,
    shape: tuple[int, ...] = SHAPE,
    placement: Placement = DEVICE,
) -> int:
    cache = node.manager.allocate_cache(desc_of(shape, placement), keys)
    fill(cache, seed)
    node.caches[cache.cache_id] = cache
    return cache.cache_id


def allocate_blocks(
    node: Node,
    key: BlocksCacheKey | None = None,
    seed: int = 1,
    shape: tuple[int, ...] = SHAPE,
    placement: Placement = DEVICE,
) -> int:
    cache = node.manager.allocate_blocks_cache(desc_of(shape, placement), key)
    fill(cache, seed)
    node.caches[cache.cache_id] = cache
    return cache.cache_id


def allocate_and_deallocate(node: Node, keys: Sequence[CacheKey], seed: int) -> int:
    cache = node.manager.allocate_cache(desc_of(SHAPE), keys)
    fill(cache, seed)
    node.manager.deallocate_cache(cache)
    return cache.cache_id


def deallocate(node: Node, cache_id: int) -> None:
    cache = node.caches[cache_id]
    if cache.is_blocks_cache:
        node.manager.deallocate_blocks_cache(cache)
    else:
        node.manager.deallocate_cache(cache)


def remove_key(node: Node, key: CacheKey) -> None:
    node.manager.remove_cache_key(key)


def register(node: Node, keys: Sequence[CacheKey]) -> int:
    return node.rows_cache(*SHAPE, seed=1, keys=keys).cache_id


def unregister(node: Node, cache_id: int) -> None:
    node.manager.unregister_cache(cache_id)


def is_all_free(node: Node) -> bool:
    """Whether the whole pool can be allocated; it is given back at once."""
    with suppress(LLMException):
        cache = node.manager.allocate_blocks_cache(desc_of((1, 1, WHOLE_POOL)))
        node.manager.deallocate_blocks_cache(cache)
        return True
    return False


# -- the pair --------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A puller here, an owner elsewhere with a pool for one cache, and its id."""

    node: Node
    owner: NodeProcess
    results: list[Cache] = field(default_factory=list)

    def pull(self, key: CacheKey | CacheKeyByIdAndIndex, **kwargs: Any) -> Bytes:
        """A row of the owner's, which a pull into a row of ours between two others brings."""
        cache = self.node.rows_cache(SHAPE[0], 3, SHAPE[2])
        array = self.node.arrays[cache.cache_id]
        try:
            self.node.manager.pull_cache(key, cache, 1, **kwargs)
        finally:
            assert not array[:, 0].any()
            assert not array[:, 2].any()
            self.node.manager.unregister_cache(cache.cache_id)
        return array[:, 1]

    def refused(self, key: CacheKey | CacheKeyByIdAndIndex, **kwargs: Any) -> LLMStatusCode:
        return status_of(self.pull, key, **kwargs)


def row(seed: int, index: int) -> Bytes:
    return make_array((SHAPE[0], SHAPE[1] * SHAPE[2]), seed).reshape(SHAPE)[:, index]


def make_pair(node: Node, owner: NodeProcess, path: str, *, is_accessible: bool) -> Pair:
    settings = {"enable_remote_cache_accessible": is_accessible, "transfer_path": path}
    port = owner.call(
        Node.start,
        LLMRole.PROMPT,
        1,
        listen_ip_info="127.0.0.1:0",
        mem_pool_cfg=pool(WHOLE_POOL),
        **settings,
    )
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) is SUCCESS
    return Pair(node, owner)


@pytest.fixture
def pair(node: Node, peer: NodeProcess, path: str) -> Pair:
    """In two-sided mode."""
    return make_pair(node, peer, path, is_accessible=False)


@pytest.fixture
def accessible(node: Node, peer: NodeProcess, path: str) -> Pair:
    """In remote-accessible mode."""
    return make_pair(node, peer, path, is_accessible=True)


@pytest.fixture
def either(node: Node, peer: NodeProcess, path: str, is_accessible: bool) -> Pair:
    return make_pair(node, peer, path, is_accessible=is_accessible)


def key(req_id: int, model_id: int = 0) -> CacheKey:
    return CacheKey(1, req_id, model_id)


def prefix(prefix_id: int, model_id: int = 0) -> CacheKey:
    return CacheKey(1, NO_ID, model_id, prefix_id)


def by_id(cache_id: int, index: int = 0) -> CacheKeyByIdAndIndex:
    return CacheKeyByIdAndIndex(1, cache_id, index)


@pytest.fixture
def lone(node: Node) -> Node:
    """A node with a pool and no peer."""
    return starts(node, mem_pool_cfg=pool(WHOLE_POOL))
