"""Clusters of several devices for tests, of C++ shape: in this process, and in another one."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from cpp_cluster import LISTEN, LOCAL, describe

from llm_datadist import cpp as c
from llm_datadist.testing.cluster import Bytes, Node, addrs_of, make_array

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Shape: TypeAlias = tuple[int, int, int]
SHAPE = (4, 8, 64)
THEIRS = (4, 16, 64)


class Several:
    """An instance with so many devices, and what it registered: [device, tensor, row, byte]."""

    def __init__(self, cluster_id: int, devices: int) -> None:
        self.cluster_id = cluster_id
        self.devices = devices
        self.datadist = c.LlmDataDist(cluster_id, c.LlmRole.kMix)
        self.arrays: dict[int, Bytes] = {}

    def initialize(self, path: str = "auto", listens: int = 0, **settings: str) -> c.Status:
        """Listens on as many ports; settings are named by the constants OPTION_*, without that."""
        options = {c.OPTION_DEVICE_ID: ";".join(map(str, range(self.devices)))}
        if listens:
            options[c.OPTION_LISTEN_IP_INFO] = ";".join([LISTEN] * listens)
        given = {getattr(c, f"OPTION_{name}"): text for name, text in settings.items()}
        return self.datadist.Initialize({**options, "llm_datadist.Path": path, **given})

    @property
    def ports(self) -> list[int]:
        return [endpoint.port for endpoint in self.datadist.listen_endpoints]

    def add(self, shape: Shape = SHAPE, seed: int | None = None) -> c.Cache:
        array = make_array((self.devices, *shape), seed)
        addrs = [addr for device in array for addr in addrs_of(device)]
        status, cache_id = self.datadist.RegisterKvCache(describe(shape), addrs)
        assert status == c.LLM_SUCCESS
        self.arrays[cache_id] = array
        return c.Cache(cache_id, addrs, describe(shape))

    def array_of(self, cache: c.Cache) -> Bytes:
        return self.arrays[cache.cache_id]

    def link(self, ports: Sequence[int], cluster_id: int = 5, timeout: int = 5000) -> c.Status:
        """One status for all devices."""
        status, rets = self.datadist.LinkLlmClusters([info_of(ports, cluster_id)], timeout)
        assert rets == [status]
        return status

    def num_links(self, cluster_id: int) -> int:
        """One for each device."""
        return sum(link.cluster_id == cluster_id for link in self.datadist.links())


def info_of(ports: Sequence[int], cluster_id: int = 5) -> c.ClusterInfo:
    return c.ClusterInfo(
        remote_cluster_id=cluster_id,
        local_ip_infos=[LOCAL] * len(ports),
        remote_ip_infos=[c.IpInfo("127.0.0.1", port) for port in ports],
    )


def is_random(shape: tuple[int, ...], seed: int, array: Bytes) -> bool:
    return np.array_equal(array, make_array(shape, seed))


@contextmanager
def several(cluster_id: int, devices: int) -> Iterator[Several]:
    """Not initialised yet; finalized in the end."""
    cluster = Several(cluster_id, devices)
    try:
        yield cluster
    finally:
        cluster.datadist.Finalize()


# -- in the other process --

_there: dict[int, Several] = {}


def start_there(node: Node, cluster_id: int, devices: int, path: str = "auto") -> list[int]:
    """The ports of the devices."""
    cluster = _there[cluster_id] = Several(cluster_id, devices)
    assert cluster.initialize(path, listens=devices) == c.LLM_SUCCESS
    return cluster.ports


def stop_there(node: Node) -> None:
    for cluster in _there.values():
        cluster.datadist.Finalize()
    _there.clear()


def add_there(node: Node, cluster_id: int, shape: Shape, seed: int | None) -> int:
    return _there[cluster_id].add(shape, seed).cache_id


def look_there(node: Node, cluster_id: int, cache_id: int) -> Bytes:
    return _there[cluster_id].arrays[cache_id]


def linked_there(node: Node, cluster_id: int, to: int) -> int:
    return _there[cluster_id].num_links(to)
