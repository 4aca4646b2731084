"""Clusters of several devices for tests, of the v1 mode: in this process, and in another one."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
from v1_cluster import desc_of

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Bytes, Node, make_array

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.kv_cache import KvCache
    from llm_datadist.kv_cache_manager import KvCacheManager
    from llm_datadist.testing.cluster import NodeProcess

SUCCESS = LLMStatusCode.LLM_SUCCESS
PAGE = 65536


class Several:
    """A cluster of the v1 mode with so many devices, and its caches, so that nobody frees them."""

    def __init__(self, role: LLMRole, cluster_id: int, devices: int) -> None:
        self.devices = devices
        self.datadist = LLMDataDist(role, cluster_id)
        self.caches: dict[int, KvCache] = {}

    def start(self, pages: int = 256, listens: bool = False, **settings: object) -> Several:
        config = LLMConfig()
        config.device_id = list(range(self.devices))
        config.sync_kv_timeout = 20000
        config.ge_options = {"ge.flowGraphMemMaxSize": str(pages * PAGE)}
        if listens:
            config.listen_ip_info = ";".join(["127.0.0.1:0"] * self.devices)
        for name, value in settings.items():
            setattr(config, name, value)
        self.datadist.init(config.generate_options())
        return self

    @property
    def manager(self) -> KvCacheManager:
        return self.datadist.kv_cache_manager

    @property
    def ports(self) -> list[int]:
        return [endpoint.port for endpoint in self.datadist.listen_endpoints]

    def rows(self, *shape: int, seed: int | None = None, keys: Sequence[CacheKey] = ()) -> KvCache:
        return self._keep(self.manager.allocate_cache(desc_of(*shape), keys), seed)

    def blocks(
        self, *shape: int, seed: int | None = None, key: BlocksCacheKey | None = None
    ) -> KvCache:
        return self._keep(self.manager.allocate_blocks_cache(desc_of(*shape), key), seed)

    def _keep(self, cache: KvCache, seed: int | None) -> KvCache:
        self.caches[cache.cache_id] = cache
        desc = cache.cache_desc
        values = make_array((self.devices, desc.num_tensors, *desc.shape), seed)
        for index in range(desc.num_tensors):
            tensors = self.manager.get_cache_tensors(cache, index)
            assert len(tensors) == self.devices
            for tensor, part in zip(tensors, values[:, index], strict=True):
                tensor.numpy()[:] = part
        return cache

    def read(self, cache: KvCache) -> Bytes:
        """[device, tensor, row or block, byte]"""
        get, count = self.manager.get_cache_tensors, cache.cache_desc.num_tensors
        each = [[tensor.numpy() for tensor in get(cache, index)] for index in range(count)]
        return np.stack([np.stack(tensors) for tensors in each], axis=1)

    def link(self, ports: Sequence[int], cluster_id: int = 1) -> LLMStatusCode:
        return self.datadist.link_clusters([info_of(ports, cluster_id)], 5000)[1][0]


def info_of(ports: Sequence[int], cluster_id: int = 1) -> LLMClusterInfo:
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    for port in ports:
        info.append_local_ip_info("127.0.0.1", 0)
        info.append_remote_ip_info("127.0.0.1", port)
    return info


@contextmanager
def several(role: LLMRole, devices: int, cluster_id: int = 2) -> Iterator[Several]:
    """Not initialised yet; finalized in the end."""
    cluster = Several(role, cluster_id, devices)
    try:
        yield cluster
    finally:
        cluster.datadist.finalize()


# -- in the other process --

there: list[Several] = []


def start_there(node: Node, role: LLMRole, devices: int, path: str = "auto") -> list[int]:
    there.append(Several(role, 1, devices).start(listens=True, transfer_path=path))
    return there[0].ports


def stop_there(node: Node) -> None:
    while there:
        there.pop().datadist.finalize()


def rows_there(node: Node, *shape: int, seed: int, keys: Sequence[CacheKey]) -> int:
    return there[0].rows(*shape, seed=seed, keys=keys).cache_id


def blocks_there(node: Node, *shape: int, seed: int | None, key: BlocksCacheKey | None) -> int:
    return there[0].blocks(*shape, seed=seed, key=key).cache_id


def addrs_there(node: Node, cache_id: int) -> list[list[int]]:
    return there[0].caches[cache_id].per_device_tensor_addrs


def read_there(node: Node, cache_id: int) -> Bytes:
    return there[0].read(there[0].caches[cache_id])


@pytest.fixture
def remote(peer: NodeProcess) -> Iterator[NodeProcess]:
    """Another process with cluster 1, finalized after the test."""
    yield peer
    peer.call(stop_there)
