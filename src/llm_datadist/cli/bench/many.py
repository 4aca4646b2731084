"""What many links cost one process: time, memory, threads, and each pull among them."""

from __future__ import annotations

import os
import resource
import statistics
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm_datadist import cpp as c
from llm_datadist.cli.bench.contestant import Owner, wait_for_end
from llm_datadist.cli.bench.scenarios import Figure
from llm_datadist.cli.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from numpy.typing import NDArray

_TIMEOUT_MS = 120_000
#: clusters of one process; each has a loop's thread, an epoll and a port
_CLUSTERS = 128
_PULLS = 2000
_BLOCKS, _BLOCK_NBYTES = 8, 4096
_DESC = c.CacheDesc(num_tensors=1, data_type=c.DataType.DT_UINT8, shape=[_BLOCKS, _BLOCK_NBYTES])


class Peer(NamedTuple):
    """A cluster to link to."""

    cluster_id: int
    port: int
    cache_id: int


class Usage(NamedTuple):
    """What this process holds."""

    resident_nbytes: int
    threads: int
    descriptors: int


def many_links(count: int, path: str) -> Iterator[Figure]:
    """One process that links to `count` clusters in other processes, and pulls from each."""
    _raise_descriptors()
    with ExitStack() as stack:
        peers: list[Peer] = []
        while len(peers) < count:
            begin = len(peers) + 1
            size = min(_CLUSTERS, count - len(peers))
            owner = Owner(_own_clusters, range(begin, begin + size), path)
            stack.callback(owner.close)
            peers += (Peer(*fields) for fields in owner.greeting)
        hub = _Reader(count + 1, path)
        stack.callback(hub.cluster.Finalize)
        alone = _Reader(count + 2, path)
        stack.callback(alone.cluster.Finalize)
        alone.link(peers[:1])
        yield from _figures(hub, alone, peers)


def _figures(hub: _Reader, alone: _Reader, peers: list[Peer]) -> Iterator[Figure]:
    count = len(peers)
    hub.link(peers[:1])
    before = _usage()
    linked_s = hub.link(peers[1:])
    idle = _usage()
    for peer in peers:  # streams and tables are there then
        hub.pull_s(peer)
    used = _usage()
    one, among, in_turn = _medians_us(hub, alone, peers)
    unlinked_s = hub.unlink(peers[1:])
    others = count - 1
    yield Figure(f"link {others:,} clusters in one call", linked_s, "s")
    yield Figure("link one of them", linked_s / others * 1e3, "ms")
    yield Figure("unlink them", unlinked_s, "s")
    for when, usage in (("linked", idle), ("used once", used)):
        nbytes = usage.resident_nbytes - before.resident_nbytes
        yield Figure(f"memory of a link, {when}", nbytes / others / 1024, "KiB")
        more = usage.descriptors - before.descriptors
        yield Figure(f"descriptors of a link, {when}", more / others, "")
        yield Figure(f"threads for all of them, {when}", usage.threads - before.threads, "")
    yield Figure("one pull with one link", one, "us")
    yield Figure(f"one pull among {count:,} links", among, "us")
    yield Figure("… of one with one link", among / one, "x")
    yield Figure("one pull, each from another peer", in_turn, "us")
    yield Figure("… from another peer, of one with one link", in_turn / one, "x")


def _medians_us(hub: _Reader, alone: _Reader, peers: list[Peer]) -> list[float]:
    """A pull by who has one link, by the hub from the same peer, from another peer each time."""
    seconds: tuple[list[float], ...] = ([], [], [])
    for number in range(_PULLS):
        seconds[0].append(alone.pull_s(peers[0]))
        seconds[1].append(hub.pull_s(peers[0]))
        seconds[2].append(hub.pull_s(peers[number * 7919 % len(peers)]))
    return [statistics.median(each) * 1e6 for each in seconds]


class _Reader:
    """A cluster of this process that links to others."""

    def __init__(self, cluster_id: int, path: str) -> None:
        self.cluster, self._array = _make_cluster(cluster_id, path)
        addr = self._array.ctypes.data
        _, cache_id = self.cluster.RegisterKvCache(_DESC, [addr])
        self._cache = c.Cache(cache_id, [addr], _DESC)

    def link(self, peers: list[Peer]) -> float:
        """The seconds that it took."""
        begun = time.perf_counter()
        status, _ = self.cluster.LinkLlmClusters([_info(peer) for peer in peers], _TIMEOUT_MS)
        seconds = time.perf_counter() - begun
        if status != c.LLM_SUCCESS:
            raise CommandError(f"linking {len(peers)} clusters ended with {status}")
        return seconds

    def unlink(self, peers: list[Peer]) -> float:
        """The seconds that it took."""
        begun = time.perf_counter()
        status, _ = self.cluster.UnlinkLlmClusters(
            [_info(peer) for peer in peers], _TIMEOUT_MS, False
        )
        seconds = time.perf_counter() - begun
        if status != c.LLM_SUCCESS:
            raise CommandError(f"unlinking {len(peers)} clusters ended with {status}")
        return seconds

    def pull_s(self, peer: Peer) -> float:
        index = c.CacheIndex(peer.cluster_id, peer.cache_id)
        begun = time.perf_counter()
        status = self.cluster.PullKvBlocks(index, self._cache, [1, 5], [2, 0])
        seconds = time.perf_counter() - begun
        if status != c.LLM_SUCCESS:
            raise CommandError(f"a pull ended with {status}")
        return seconds


def _info(peer: Peer) -> c.ClusterInfo:
    return c.ClusterInfo(
        remote_cluster_id=peer.cluster_id,
        local_ip_infos=[c.IpInfo("127.0.0.1", 0)],
        remote_ip_infos=[c.IpInfo("127.0.0.1", peer.port)],
    )


def _make_cluster(
    cluster_id: int, path: str, listen: str = ""
) -> tuple[c.LlmDataDist, NDArray[np.uint8]]:
    options = {
        c.OPTION_DEVICE_ID: "0",
        "llm.EnableRemoteCacheAccessible": "1",
        "llm_datadist.Path": path,
    }
    if listen:
        options[c.OPTION_LISTEN_IP_INFO] = listen
    cluster = c.LlmDataDist(cluster_id, c.LlmRole.kMix)
    if cluster.Initialize(options) != c.LLM_SUCCESS:
        raise CommandError(f"cluster {cluster_id} could not be started")
    return cluster, np.zeros((_BLOCKS, _BLOCK_NBYTES), np.uint8)


def _usage() -> Usage:
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    return Usage(
        pages * resource.getpagesize(),
        len(os.listdir("/proc/self/task")),
        len(os.listdir("/proc/self/fd")),
    )


def _raise_descriptors() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _own_clusters(pipe: Connection, ids: range, path: str) -> None:
    """Clusters that listen, with a small cache each, in one process."""
    _raise_descriptors()
    kept, peers = [], []
    for cluster_id in ids:
        cluster, array = _make_cluster(cluster_id, path, "127.0.0.1:0")
        _, cache_id = cluster.RegisterKvCache(_DESC, [array.ctypes.data])
        kept.append((cluster, array))
        endpoint = cluster.listen_endpoint
        assert endpoint is not None
        peers.append((cluster_id, endpoint.port, cache_id))
    pipe.send(peers)
    wait_for_end(pipe)
