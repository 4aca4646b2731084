"""Many clusters in one process, of the C++-shaped interface; run by a NodeProcess."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist import cpp as c
from llm_datadist.testing.cluster import Bytes, Node, addrs_of, make_array

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LINK_MS = 20_000
SHAPE = (2, 8, 64)

_clusters: dict[int, tuple[c.LlmDataDist, Bytes, c.Cache]] = {}


def open_clusters(_: Node, ids: Sequence[int], address: str) -> dict[int, tuple[int, int]]:
    """Clusters with a cache each; their ports and cache ids."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    options = {c.OPTION_DEVICE_ID: "0", c.OPTION_SYNC_CACHE_WAIT_TIME: "10000"}
    if address:
        options[c.OPTION_LISTEN_IP_INFO] = address
    found = {}
    for cluster_id in ids:
        cluster = c.LlmDataDist(cluster_id, c.LlmRole.kMix)
        assert cluster.Initialize(options) == c.LLM_SUCCESS
        array = make_array(SHAPE, cluster_id)
        desc = c.CacheDesc(
            num_tensors=SHAPE[0], data_type=c.DataType.DT_INT8, shape=list(SHAPE[1:])
        )
        status, cache_id = cluster.RegisterKvCache(desc, addrs_of(array))
        assert status == c.LLM_SUCCESS
        cache = c.Cache(cache_id, addrs_of(array), desc)
        _clusters[cluster_id] = cluster, array, cache
        endpoint = cluster.listen_endpoint
        found[cluster_id] = (endpoint.port if endpoint else 0), cache_id
    return found


def close_clusters(_: Node) -> None:
    for cluster, _array, _cache in _clusters.values():
        cluster.Finalize()
    _clusters.clear()


def link_count(_: Node) -> int:
    return sum(len(cluster.links()) for cluster, _array, _cache in _clusters.values())


def link_all(_: Node, ports: dict[int, int]) -> dict[int, int]:
    """Each cluster here links to each of those; how many calls ended with which status."""
    return _of_each(lambda cluster, infos: cluster.LinkLlmClusters(infos, LINK_MS)[1], ports)


def unlink_all(_: Node, ports: dict[int, int], force: bool) -> dict[int, int]:
    return _of_each(
        lambda cluster, infos: cluster.UnlinkLlmClusters(infos, LINK_MS, force)[1], ports
    )


def _of_each(
    work: Callable[[c.LlmDataDist, list[c.ClusterInfo]], list[c.Status]], ports: dict[int, int]
) -> dict[int, int]:
    infos = [
        c.ClusterInfo(
            remote_cluster_id=cluster_id,
            local_ip_infos=[c.IpInfo("127.0.0.1", 0)],
            remote_ip_infos=[c.IpInfo("127.0.0.1", port)],
        )
        for cluster_id, port in ports.items()
    ]
    counts: dict[int, int] = {}
    with ThreadPoolExecutor(len(_clusters)) as pool:
        calls = [pool.submit(work, cluster, infos) for cluster, _, _ in _clusters.values()]
        for call in calls:
            for status in call.result():
                counts[status] = counts.get(status, 0) + 1
    return counts


def pull_all(_: Node, cache_ids: dict[int, int], seed: int) -> tuple[int, list[str]]:
    """Pulls over every link; how many brought the right bytes, and what was wrong."""
    rng = np.random.default_rng(seed)
    sources = {cluster_id: make_array(SHAPE, cluster_id) for cluster_id in cache_ids}
    right, wrong = 0, []
    for my_id, (cluster, array, cache) in _clusters.items():
        for cluster_id, cache_id in cache_ids.items():
            array[:] = 0
            count = int(rng.integers(1, SHAPE[1] + 1))
            src, dst = (rng.permutation(SHAPE[1])[:count].tolist() for _ in range(2))
            index = c.CacheIndex(cluster_id, cache_id)
            status = cluster.PullKvBlocks(index, cache, src, dst)
            expected = np.zeros_like(array)
            expected[:, dst] = sources[cluster_id][:, src]
            if status == c.LLM_SUCCESS and np.array_equal(array, expected):
                right += 1
            else:
                wrong.append(f"pull of {my_id} from {cluster_id}: {status}")
    return right, wrong
