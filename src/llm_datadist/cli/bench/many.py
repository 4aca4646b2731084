"""What many links cost one process: time, memory, threads, and each pull among them."""

from __future__ import annotations

import os
import resource
import statistics
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm_datadist import (
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMClusterInfo,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist import cpp as c
from llm_datadist.cli.bench import ours
from llm_datadist.cli.bench.ceiling import wait_for_end
from llm_datadist.cli.bench.contestant import Job, Owner
from llm_datadist.cli.bench.failure import BenchError
from llm_datadist.cli.bench.scenarios import Figure
from llm_datadist.cli.bench.workload import SHAPES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from llm_datadist import Cache, LLMDataDist

_TIMEOUT_MS = 120_000
#: clusters of one process; each has a loop's thread, an epoll and a port
_CLUSTERS = 128
_PULLS = 200
_BLOCKS, _BLOCK_NBYTES = 8, 4096


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
    job = Job(SHAPES["one-block"], path=path, threads=1)
    with ExitStack() as stack:
        peers: list[Peer] = []
        while len(peers) < count:
            begin = len(peers) + 1
            size = min(_CLUSTERS, count - len(peers))
            owner = Owner(_own_clusters, range(begin, begin + size), path)
            stack.callback(owner.close)
            peers += (Peer(*fields) for fields in owner.greeting)
        hub = ours.start(LLMRole.DECODER, count + 1, job)
        stack.callback(hub.finalize)
        yield from _figures(hub, peers)


def _figures(hub: LLMDataDist, peers: list[Peer]) -> Iterator[Figure]:
    count = len(peers)
    cache = _destination(hub)
    _link(hub, peers[:1])
    alone = [_pull_us(hub, cache, peers[:1])]
    before = _usage()
    begun = time.perf_counter()
    _link(hub, peers[1:])
    linked_s = time.perf_counter() - begun
    idle = _usage()
    _pull_us(hub, cache, peers, len(peers))  # once over each: streams and tables are there then
    among = _pull_us(hub, cache, peers)
    used = _usage()
    begun = time.perf_counter()
    _unlink(hub, peers[1:])
    unlinked_s = time.perf_counter() - begun
    alone.append(_pull_us(hub, cache, peers[:1]))
    others = count - 1
    yield Figure(f"link {others:,} clusters in one call", linked_s, "s")
    yield Figure("each", linked_s / others * 1e3, "ms")
    yield Figure("unlink them", unlinked_s, "s")
    for when, usage in (("linked", idle), ("used once", used)):
        nbytes = usage.resident_nbytes - before.resident_nbytes
        yield Figure(f"memory of a link, {when}", nbytes / others / 1024, "KiB")
        more = usage.descriptors - before.descriptors
        yield Figure(f"descriptors of a link, {when}", more / others, "")
        yield Figure(f"threads for all of them, {when}", usage.threads - before.threads, "")
    yield Figure("one pull with one link", statistics.mean(alone), "us")
    yield Figure(f"one pull among {count:,} links", among, "us")
    yield Figure("of one with one link", among / statistics.mean(alone), "x")


def _pull_us(hub: LLMDataDist, cache: Cache, peers: list[Peer], pulls: int = _PULLS) -> float:
    """The median of pulls, each from another peer in turn."""
    manager, seconds = hub.cache_manager, []
    for number in range(pulls):
        peer = peers[number * 7919 % len(peers)]
        key = CacheKeyByIdAndIndex(peer.cluster_id, peer.cache_id, 0)
        begun = time.perf_counter()
        manager.pull_blocks(key, cache, [1, 5], [2, 0])
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds) * 1e6


def _destination(hub: LLMDataDist) -> Cache:
    array = np.zeros((1, _BLOCKS, _BLOCK_NBYTES), np.uint8)
    desc = CacheDesc(1, [_BLOCKS, _BLOCK_NBYTES], DataType.DT_INT8)
    return hub.cache_manager.register_blocks_cache(desc, [array])


def _link(hub: LLMDataDist, peers: list[Peer]) -> None:
    status, _ = hub.link_clusters([_info(peer) for peer in peers], _TIMEOUT_MS)
    if status is not LLMStatusCode.LLM_SUCCESS:
        raise BenchError(f"linking {len(peers)} clusters ended with {status}")


def _unlink(hub: LLMDataDist, peers: list[Peer]) -> None:
    hub.unlink_clusters([_info(peer) for peer in peers], _TIMEOUT_MS)


def _info(peer: Peer) -> LLMClusterInfo:
    info = LLMClusterInfo()
    info.remote_cluster_id = peer.cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info("127.0.0.1", peer.port)
    return info


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
    options = {
        c.OPTION_DEVICE_ID: "0",
        c.OPTION_LISTEN_IP_INFO: "127.0.0.1:0",
        "llm.EnableRemoteCacheAccessible": "1",
        "llm_datadist.Path": path,
    }
    array = np.zeros((_BLOCKS, _BLOCK_NBYTES), np.uint8)
    desc = c.CacheDesc(num_tensors=1, data_type=c.DataType.DT_INT8, shape=list(array.shape))
    clusters, peers = [], []
    for cluster_id in ids:
        cluster = c.LlmDataDist(cluster_id, c.LlmRole.kPrompt)
        cluster.Initialize(options)
        _, cache_id = cluster.RegisterKvCache(desc, [array.ctypes.data])
        clusters.append(cluster)
        endpoint = cluster.listen_endpoint
        assert endpoint is not None
        peers.append((cluster_id, endpoint.port, cache_id))
    pipe.send(peers)
    wait_for_end(pipe)
