"""Clusters of the C++-shaped interface for tests: in this process, and in another one."""

from __future__ import annotations

import json
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, TypeAlias

import pytest

from llm_datadist import cpp as c
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, addrs_of, make_array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MakeCluster: TypeAlias = "Callable[..., Cluster]"

LISTEN = "127.0.0.1:0"
SHAPE = (6, 8, 64)
#: an address that belongs to nobody: discard, and not listened to
NOBODY = c.IpInfo("127.0.0.1", 9)
LOCAL = c.IpInfo("127.0.0.1", 0)


class Cluster:
    """An instance, and the memory of what it registers, by cache id."""

    def __init__(self, cluster_id: int, role: c.LlmRole = c.LlmRole.kMix) -> None:
        self.cluster_id = cluster_id
        self.datadist = c.LlmDataDist(cluster_id, role)
        self.arrays: dict[int, Bytes] = {}

    def initialize(self, path: str = "auto", **settings: str) -> c.Status:
        """Settings are named by the constants OPTION_*, without that."""
        options = {getattr(c, f"OPTION_{name}"): text for name, text in settings.items()}
        fixed = {c.OPTION_DEVICE_ID: "0", "llm_datadist.Path": path}
        return self.datadist.Initialize({**fixed, **options})

    def start(self, path: str = "auto", **settings: str) -> Cluster:
        assert self.initialize(path, **settings) == c.LLM_SUCCESS
        return self

    @property
    def port(self) -> int:
        endpoint = self.datadist.listen_endpoint
        return endpoint.port if endpoint else 0

    def add(self, shape: tuple[int, int, int] = SHAPE, seed: int | None = None) -> c.Cache:
        """Registers an array [tensors, rows, bytes], random or zeros."""
        array = make_array(shape, seed)
        desc = describe(shape)
        status, cache_id = self.datadist.RegisterKvCache(desc, addrs_of(array))
        assert status == c.LLM_SUCCESS
        self.arrays[cache_id] = array
        return c.Cache(cache_id, addrs_of(array), desc)

    def allocate(self, shape: tuple[int, int, int]) -> c.Cache:
        status, cache = self.datadist.AllocateCache(describe(shape))
        assert status == c.LLM_SUCCESS
        return cache

    def array_of(self, cache: c.Cache) -> Bytes:
        return self.arrays[cache.cache_id]

    def link(self, *peers: Cluster, timeout: int = 3000) -> list[c.Status]:
        infos = [info_of(peer.cluster_id, peer.port) for peer in peers]
        return self.datadist.LinkLlmClusters(infos, timeout)[1]


def describe(shape: tuple[int, int, int]) -> c.CacheDesc:
    return c.CacheDesc(
        num_tensors=shape[0], data_type=c.DataType.DT_INT8, shape=[shape[1], shape[2]]
    )


def info_of(cluster_id: int, port: int) -> c.ClusterInfo:
    return c.ClusterInfo(
        remote_cluster_id=cluster_id,
        local_ip_infos=[LOCAL],
        remote_ip_infos=[c.IpInfo("127.0.0.1", port)],
    )


def pool_class(total: int = 1 << 21, block: int = 256, largest: int = 8192) -> dict[str, int]:
    return {"total_size": total, "blk_size": block, "max_buf_size": largest}


def pool_cfg(*classes: dict[str, int], **others: int) -> str:
    return json.dumps({"buf_cfg": classes, **others})


@contextmanager
def clusters() -> Iterator[MakeCluster]:
    """Makes clusters of this process, with ids 1, 2, 3, and finalizes them in the end."""
    made: list[Cluster] = []
    ids = count(1)

    def make(cluster_id: int | None = None, role: c.LlmRole = c.LlmRole.kMix) -> Cluster:
        made.append(Cluster(next(ids) if cluster_id is None else cluster_id, role))
        return made[-1]

    try:
        yield make
    finally:
        for cluster in made:
            cluster.datadist.Finalize()


@pytest.fixture
def make_cluster() -> Iterator[MakeCluster]:
    with clusters() as make:
        yield make


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    """Not initialised yet."""
    return make_cluster()


@pytest.fixture
def trio(make_cluster: MakeCluster, path: str) -> tuple[Cluster, Cluster, Cluster]:
    """Cluster 1 of this process, linked to 2 and 3 of this process."""
    ours, second, third = (make_cluster() for _ in range(3))
    ours.start(path)
    for peer in (second, third):
        peer.start(path, LISTEN_IP_INFO=LISTEN)
    assert ours.link(second, third) == [c.LLM_SUCCESS] * 2
    assert [link.path for link in ours.datadist.links()] == [path] * 2
    return ours, second, third


@pytest.fixture
def remote(peer: NodeProcess) -> Iterator[NodeProcess]:
    """Another process for clusters, finalized after the test."""
    yield peer
    peer.call(stop_there)


@pytest.fixture
def ours(cluster: Cluster, remote: NodeProcess, path: str) -> Cluster:
    """Cluster 1, linked to cluster 5 of the other process."""
    port = remote.call(start_there, 5, path)
    cluster.start(path)
    infos = [info_of(5, port)]
    assert cluster.datadist.LinkLlmClusters(infos, 3000) == (c.LLM_SUCCESS, [c.LLM_SUCCESS])
    assert [link.path for link in cluster.datadist.links()] == [path]
    return cluster


# -- clusters in the other process --

_there: dict[int, Cluster] = {}


def start_there(node: Node, cluster_id: int, path: str = "auto") -> int:
    _there[cluster_id] = Cluster(cluster_id).start(path, LISTEN_IP_INFO=LISTEN)
    return _there[cluster_id].port


def stop_there(node: Node) -> None:
    for cluster in _there.values():
        cluster.datadist.Finalize()
    _there.clear()


def add_there(node: Node, cluster_id: int, shape: tuple[int, int, int], seed: int) -> int:
    return _there[cluster_id].add(shape, seed).cache_id


def look_there(node: Node, cluster_id: int, cache_id: int) -> Bytes:
    return _there[cluster_id].arrays[cache_id]


def unregister_there(node: Node, cluster_id: int, cache_id: int) -> c.Status:
    return _there[cluster_id].datadist.UnregisterKvCache(cache_id)
