"""Links over slow networks: two hosts of one machine, and the kernel's netem on their cable."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
import two_hosts
from two_hosts import HOSTS, Hosts

from bed.inside.slow_network import TURN_S, Network, behave, iperf, serve_iperf
from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Callable

machines, apart, hosts = two_hosts.machines, two_hosts.apart, two_hosts.hosts

SUCCESS, TIMEOUT = LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_TIMEOUT
LINK_TIMEOUT_MS = 50_000
#: what a busy, emulated machine needs to schedule, beyond the fifth that is promised
SLACK_S = 0.5
#: of key 0, with bytes of the cluster's id; an eighth of it is 256 KiB
SHAPE = (4, 64, 8 * 1024)
FEW = list(range(0, 64, 8))
#: of key 1, and no network here moves it in time
HUGE = (4, 64, 512 * 1024)
DEADLINE_MS = 5_000

DELAYS_MS = (0.1, 5, 50, 200)
NETWORKS = [
    *(Network(delay, loss) for delay in DELAYS_MS for loss in (0, 1, 5)),
    *(Network(delay, reorder=25) for delay in (5, 50)),
    *(Network(0.1, mbit_per_s=rate) for rate in (100, 1_000, 10_000)),
]
LATE = [
    *(Network(delay, mbit_per_s=100) for delay in DELAYS_MS),
    Network(50, loss=1, mbit_per_s=100),
    Network(5, loss=5, mbit_per_s=100),
]
#: where even an emulated machine is faster than the network, and a pull is soon at full speed
SLOW = [Network(delay, mbit_per_s=100) for delay in (0.1, 5)]
#: where it may be the machine that is measured
FAST = [
    *(Network(delay, mbit_per_s=1_000) for delay in (0.1, 5, 50)),
    Network(0.1, mbit_per_s=10_000),
]
LOSSY = Network(50, loss=1)
#: what chance decides is measured for longer
LONG_TURN_S = 15


# -- run by the hosts ------------------------------------------------------------------------------


def start(
    node: Node, cluster_id: int, timeout_ms: int, streams: int, *, is_accessible: bool
) -> int:
    port = node.start(
        LLMRole.MIX, cluster_id, listen_ip_info=f"{HOSTS[cluster_id - 1]}:0",
        sync_kv_timeout=timeout_ms, transfer_threads=streams,
        enable_remote_cache_accessible=is_accessible,
    )  # fmt: skip
    node.blocks_cache(*SHAPE, seed=cluster_id, key=BlocksCacheKey(cluster_id, 0))
    return port


def own(node: Node, shape: tuple[int, int, int], seed: int | None) -> int:
    key = BlocksCacheKey(node.datadist.cluster_id, 1)
    return node.blocks_cache(*shape, seed=seed, key=key).cache_id


def pull(node: Node, cluster_id: int) -> bool:
    """Whether a few blocks arrive, and nothing else does."""
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, FEW, FEW)
    expected = np.zeros(SHAPE, np.uint8)
    expected[:, FEW] = make_array(SHAPE, cluster_id)[:, FEW]
    return np.array_equal(node.arrays[cache.cache_id], expected)


def push(node: Node, cluster_id: int) -> None:
    key = BlocksCacheKey(cluster_id, 1)
    node.manager.push_blocks(key, next(iter(node.caches.values())), FEW, FEW)


def has_come(node: Node, cache_id: int, cluster_id: int) -> bool:
    expected = np.zeros(SHAPE, np.uint8)
    expected[:, FEW] = make_array(SHAPE, cluster_id)[:, FEW]
    return np.array_equal(node.arrays[cache_id], expected)


def pull_all(
    node: Node, shape: tuple[int, int, int], seed: int | None = None
) -> tuple[LLMStatusCode, float]:
    """Of cluster 1's key 1, whose bytes are looked at if it has some: how that ends, and when."""
    cache = node.blocks_cache(*shape)
    blocks = list(range(shape[1]))
    begun, status = time.monotonic(), SUCCESS
    try:
        node.manager.pull_blocks(BlocksCacheKey(1, 1), cache, blocks, blocks)
    except LLMException as error:
        status = error.status_code
    took_s = time.monotonic() - begun
    if seed is not None and status is SUCCESS:
        np.testing.assert_array_equal(node.arrays[cache.cache_id], make_array(shape, seed))
    node.manager.unregister_cache(cache.cache_id)
    del node.arrays[cache.cache_id], node.caches[cache.cache_id]
    return status, took_s


# -- tests -----------------------------------------------------------------------------------------


def linked(
    hosts: Hosts, network: Network, timeout_ms: int, streams: int = 2, *, is_accessible: bool
) -> Hosts:
    for process in hosts:
        process.call(behave, network)
    one, other = hosts
    port = one.call(start, 1, timeout_ms, streams, is_accessible=is_accessible)
    other.call(start, 2, timeout_ms, streams, is_accessible=is_accessible)
    assert other.call(Node.link, port, 1, LINK_TIMEOUT_MS, host=HOSTS[0]) is SUCCESS
    return hosts


def outcome(process: NodeProcess) -> object:
    """Of what was begun there, which may take its time."""
    return process.result(timeout_s=200)


def pull_bytes_per_s(
    hosts: Hosts, network: Network, nbytes: float, streams: int, *, is_accessible: bool
) -> float:
    """The median of three pulls behind another one, all bytes of which are right."""
    shape = (4, 64, int(nbytes) // 256)
    one, other = linked(hosts, network, 100_000, streams, is_accessible=is_accessible)
    one.call(own, shape, seed=1)
    seconds = []
    for seed in (None, 1, 1, 1):
        other.begin(pull_all, shape, seed)
        status, took_s = cast("tuple[LLMStatusCode, float]", outcome(other))
        assert status is SUCCESS
        seconds.append(took_s)
    return 4 * 64 * shape[2] / statistics.median(seconds[1:])


def iperf_bytes_per_s(hosts: Hosts, streams: int, turn_s: int = TURN_S) -> float:
    one, other = hosts
    one.call(serve_iperf)
    return other.call(iperf, streams, turn_s)


def said_of(ours: float, iperfs: float) -> str:
    return f"{ours / 1e6:.2f} MB/s, iperf3 {iperfs / 1e6:.2f}: {ours / iperfs:.2f} of it"


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_bytes_go_both_ways(hosts: Hosts, network: Network, is_accessible: bool) -> None:
    linked(hosts, network, 100_000, is_accessible=is_accessible)
    others = list(zip(hosts, reversed(hosts), (2, 1), strict=True))
    for process, _, cluster_id in others:
        process.begin(pull, cluster_id)
    for process, _, _ in others:
        assert outcome(process)
    if not is_accessible:
        return
    landings = [process.call(own, SHAPE, seed=None) for process in hosts]
    for process, _, cluster_id in others:
        process.begin(push, cluster_id)
    for process, _, _ in others:
        outcome(process)
    for process, landing, (_, _, sender) in zip(hosts, landings, others, strict=True):
        assert process.call(has_come, landing, sender)


@pytest.mark.parametrize("network", LATE, ids=str)
def test_a_pull_that_cannot_be_done_in_time_is_a_timeout_in_time_and_the_next_one_is_right(
    hosts: Hosts, network: Network, is_accessible: bool
) -> None:
    one, other = linked(hosts, network, DEADLINE_MS, is_accessible=is_accessible)
    one.call(own, HUGE, seed=None)
    status, took_s = other.call(pull_all, HUGE)
    assert status is TIMEOUT
    assert took_s <= 1.2 * DEADLINE_MS / 1000 + SLACK_S
    assert other.call(pull, 1)


@pytest.mark.parametrize("network", SLOW, ids=str)
def test_as_fast_as_iperf3_where_the_network_is_slow(
    hosts: Hosts,
    network: Network,
    is_accessible: bool,
    record_property: Callable[[str, object], None],
) -> None:
    nbytes = TURN_S * network.nbytes_per_s
    ours = pull_bytes_per_s(hosts, network, nbytes, 1, is_accessible=is_accessible)
    iperfs = iperf_bytes_per_s(hosts, 1)
    record_property("measured", said_of(ours, iperfs))
    assert ours >= 0.9 * iperfs, said_of(ours, iperfs)


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize(
    ("network", "nbytes"), [(LOSSY, 4 << 20), (Network(50, mbit_per_s=100), 36 << 20)], ids=str
)
def test_what_more_streams_bring(
    hosts: Hosts,
    network: Network,
    nbytes: int,
    streams: int,
    record_property: Callable[[str, object], None],
) -> None:
    """Nothing is asked for but that it arrives: chance decides what a loss takes, and who waits."""
    ours = pull_bytes_per_s(hosts, network, nbytes, streams, is_accessible=True)
    record_property("measured", said_of(ours, iperf_bytes_per_s(hosts, streams, LONG_TURN_S)))


@pytest.mark.parametrize("network", FAST, ids=str)
def test_what_a_faster_network_brings(
    hosts: Hosts, network: Network, record_property: Callable[[str, object], None]
) -> None:
    """Nothing is asked for but that it arrives: emulated, the machine is slower than these."""
    ours = pull_bytes_per_s(hosts, network, 32 << 20, 2, is_accessible=True)
    record_property("measured", said_of(ours, iperf_bytes_per_s(hosts, 2)))
