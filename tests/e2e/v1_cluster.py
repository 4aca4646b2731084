"""Clusters of the v1 mode for tests: one here, and one in another process; their caches."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    DataType,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_datadist.kv_cache import KvCache
    from llm_datadist.kv_cache_manager import KvCacheManager

PAGE = 65536
PROMPT, DECODER, MIX = LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX
INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
#: the caches of this process by id, so that nobody collects them
KEPT: dict[int, KvCache] = {}


def start(node: Node, role: LLMRole, cluster_id: int, pages: int = 256, **settings: object) -> int:
    """Starts a node in the v1 mode, with a pool of so many pages."""
    settings = {
        "enable_cache_manager": False,
        "ge_options": {"ge.flowGraphMemMaxSize": str(pages * PAGE)},
        "sync_kv_timeout": 20000,
        **settings,
    }
    return node.start(role, cluster_id, **settings)


def manager_of(node: Node) -> KvCacheManager:
    return node.datadist.kv_cache_manager


def desc_of(*shape: int) -> CacheDesc:
    """Tensors of bytes: their number first, then the shape of each."""
    return CacheDesc(shape[0], list(shape[1:]), DataType.DT_UINT8)


def make_rows(
    node: Node, *shape: int, seed: int | None = None, keys: Sequence[CacheKey] = ()
) -> KvCache:
    cache = manager_of(node).allocate_cache(desc_of(*shape), keys)
    write(node, cache, make_array(shape, seed))
    return cache


def make_blocks(
    node: Node, *shape: int, seed: int | None = None, key: BlocksCacheKey | None = None
) -> KvCache:
    cache = manager_of(node).allocate_blocks_cache(desc_of(*shape), key)
    write(node, cache, make_array(shape, seed))
    return cache


def tensors_of(node: Node, cache: KvCache) -> list[Bytes]:
    manager, count = manager_of(node), cache.cache_desc.num_tensors
    return [manager.get_cache_tensors(cache, index)[0].numpy() for index in range(count)]


def write(node: Node, cache: KvCache, array: Bytes) -> None:
    for tensor, values in zip(tensors_of(node, cache), array, strict=True):
        tensor[:] = values


def read(node: Node, cache: KvCache) -> Bytes:
    return np.stack(tensors_of(node, cache))


def keep(cache: KvCache) -> int:
    KEPT[cache.cache_id] = cache
    return cache.cache_id


def add_rows(node: Node, *shape: int, **kwargs: Any) -> int:
    return keep(make_rows(node, *shape, **kwargs))


def add_blocks(node: Node, *shape: int, **kwargs: Any) -> int:
    return keep(make_blocks(node, *shape, **kwargs))


def add_rows_that_nobody_holds(node: Node, *shape: int, **kwargs: Any) -> int:
    return make_rows(node, *shape, **kwargs).cache_id


def addresses(node: Node, cache_id: int) -> list[int]:
    return KEPT[cache_id].per_device_tensor_addrs[0]


def read_kept(node: Node, cache_id: int) -> Bytes:
    return read(node, KEPT[cache_id])


def deallocate_kept(node: Node, cache_id: int) -> None:
    manager_of(node).deallocate_cache(KEPT[cache_id])


def remove_key(node: Node, key: CacheKey) -> None:
    manager_of(node).remove_cache_key(key)


def status_of(error: pytest.ExceptionInfo[LLMException]) -> LLMStatusCode:
    return error.value.status_code


def assert_refused(
    status: LLMStatusCode, says: str | None, call: Callable[..., object], *args: Any, **kwargs: Any
) -> None:
    with pytest.raises(LLMException, match=says) as error:
        call(*args, **kwargs)
    assert status_of(error) == status


class Gate(LayerSynchronizer):
    """Holds each layer back until `open` is called; refuses one of them."""

    def __init__(self, refused: int = -1) -> None:
        self._refused = refused
        self._is_open = threading.Event()

    def open(self) -> Gate:
        self._is_open.set()
        return self

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return self._is_open.wait(30) and layer_index != self._refused


@dataclass
class Pair:
    """A node here, linked to a node (cluster 1) in another process."""

    node: Node
    peer: NodeProcess

    @property
    def manager(self) -> KvCacheManager:
        return manager_of(self.node)


def make_pair(node: Node, peer: NodeProcess, path: str, theirs: LLMRole, ours: LLMRole) -> Pair:
    port = peer.call(start, theirs, 1, listen_ip_info="127.0.0.1:0", transfer_path=path)
    start(node, ours, 2, transfer_path=path)
    assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
    assert [link.path for link in node.datadist.links()] == [path]
    return Pair(node, peer)


@pytest.fixture
def decoder(node: Node, peer: NodeProcess, path: str) -> Pair:
    """A decoder here, linked to a prompt."""
    return make_pair(node, peer, path, PROMPT, DECODER)


@pytest.fixture
def prompt(node: Node, peer: NodeProcess, path: str) -> Pair:
    """A prompt here, linked to a decoder."""
    return make_pair(node, peer, path, DECODER, PROMPT)


@pytest.fixture
def alone(node: Node) -> Node:
    """A prompt without peers."""
    start(node, PROMPT, 1)
    return node
