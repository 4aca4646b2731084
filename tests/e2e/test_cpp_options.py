"""The C++-shaped interface: the options of Initialize, and what each of them does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import cpp_cluster
import numpy as np
import pytest
from cpp_cluster import (
    LISTEN,
    SHAPE,
    Cluster,
    add_there,
    info_of,
    pool_cfg,
    pool_class,
    start_there,
)

from llm_datadist import cpp as c
from llm_datadist.testing.cluster import NodeProcess, free_port, make_array
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable

    from cpp_cluster import MakeCluster

make_cluster = cpp_cluster.make_cluster
cluster = cpp_cluster.cluster


NAMES = {
    "OPTION_LISTEN_IP_INFO": "llm.ListenIpInfo",
    "OPTION_DEVICE_ID": "llm.DeviceId",
    "OPTION_SYNC_CACHE_WAIT_TIME": "llm.SyncKvCacheWaitTime",
    "OPTION_BUF_POOL_CFG": "llm.BufPoolCfg",
    "OPTION_ENABLE_SET_ROLE": "llm.EnableSwitchRole",
    "OPTION_LOCAL_COMM_RES": "llm.LocalCommRes",
    "OPTION_TRANSFER_BACKEND": "llm.TransferBackend",
    "OPTION_GLOBAL_RESOURCE_CONFIG": "llm.GlobalResourceConfig",
}


@pytest.mark.shows(*(f"cpp.{option}" for option in NAMES))
def test_options_are_named_as_documented() -> None:
    assert {name: getattr(c, name) for name in dir(c) if name.startswith("OPTION_")} == NAMES


@pytest.mark.shows(
    "cpp.Initialize",
    "cpp.OPTION_LISTEN_IP_INFO",
    "cpp.OPTION_DEVICE_ID",
    "cpp.OPTION_SYNC_CACHE_WAIT_TIME",
    "cpp.OPTION_ENABLE_SET_ROLE",
    "cpp.OPTION_TRANSFER_BACKEND",
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {c.OPTION_DEVICE_ID: ""},
        {c.OPTION_DEVICE_ID: "0;0"},
        {c.OPTION_DEVICE_ID: "0;"},
        {c.OPTION_DEVICE_ID: "-1"},
        {c.OPTION_DEVICE_ID: "x"},
        {c.OPTION_DEVICE_ID: "1.5"},
        {c.OPTION_DEVICE_ID: str(2**31)},
        {c.OPTION_LISTEN_IP_INFO: "127.0.0.1"},
        {c.OPTION_LISTEN_IP_INFO: ""},
        {c.OPTION_LISTEN_IP_INFO: "::1:26000"},
        {c.OPTION_LISTEN_IP_INFO: "[::1]:26000;[::1]:26001"},
        {c.OPTION_LISTEN_IP_INFO: "127.0.0.1:one"},
        {c.OPTION_LISTEN_IP_INFO: "127.0.0.1:65536"},
        {c.OPTION_LISTEN_IP_INFO: "localhost:26000"},
        {c.OPTION_LISTEN_IP_INFO: "127.0.0.1:26000;127.0.0.1:26001"},
        {c.OPTION_SYNC_CACHE_WAIT_TIME: "1s"},
        {c.OPTION_SYNC_CACHE_WAIT_TIME: "-1"},
        {c.OPTION_SYNC_CACHE_WAIT_TIME: ""},
        {c.OPTION_ENABLE_SET_ROLE: "2"},
        {c.OPTION_ENABLE_SET_ROLE: ""},
        {c.OPTION_TRANSFER_BACKEND: "hixl"},
        {c.OPTION_TRANSFER_BACKEND: "", c.OPTION_LISTEN_IP_INFO: LISTEN},
        {c.OPTION_TRANSFER_BACKEND: "other", c.OPTION_LISTEN_IP_INFO: LISTEN},
    ],
    ids=str,
)
def test_options_that_cannot_be_are_invalid(cluster: Cluster, options: dict[str, str]) -> None:
    needed = {} if not options or c.OPTION_DEVICE_ID in options else {c.OPTION_DEVICE_ID: "0"}
    assert cluster.datadist.Initialize({**needed, **options}) == c.LLM_PARAM_INVALID
    assert cluster.initialize() == c.LLM_SUCCESS


@pytest.mark.shows("cpp.OPTION_BUF_POOL_CFG")
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"buf_cfg": {}}',
        '{"buf_pool_size": -1}',
        *(
            pool_cfg({name: size for name, size in pool_class().items() if name != missing})
            for missing in pool_class()
        ),
        '{"buf_cfg": [{"total_size": "2097152", "blk_size": 256, "max_buf_size": 8192}]}',
        '{"buf_cfg": [2097152]}',
        pool_cfg(pool_class(largest=8192), pool_class(largest=4096)),
        pool_cfg(pool_class(largest=8192), pool_class(largest=8192)),
        pool_cfg(pool_class(block=257)),
        pool_cfg(pool_class(block=0)),
        pool_cfg(pool_class(block=1 << 22, largest=1 << 22, total=1 << 23)),
        pool_cfg(pool_class(block=16384, largest=8192)),
        pool_cfg(pool_class(total=(1 << 21) + 256)),
        pool_cfg(pool_class(total=1 << 32)),
        pool_cfg(pool_class(largest=1 << 21)),
    ],
)
def test_a_buffer_pool_that_cannot_be_is_invalid(cluster: Cluster, text: str) -> None:
    assert cluster.initialize(BUF_POOL_CFG=text) == c.LLM_PARAM_INVALID


@pytest.mark.shows("cpp.OPTION_BUF_POOL_CFG")
@pytest.mark.parametrize(
    "text",
    [
        pool_cfg(pool_class(), buf_pool_size=2147483648),
        pool_cfg(pool_class(), buf_pool_size=1024),
        pool_cfg(buf_pool_size=1 << 21),
        pool_cfg(pool_class(), pool_class(block=8192, largest=8193)),
        pool_cfg(pool_class(total=(1 << 32) - (1 << 21), block=1 << 21, largest=1 << 21)),
        pool_cfg(),
        "{}",
    ],
)
def test_a_buffer_pool_of_the_documented_form_is_accepted(cluster: Cluster, text: str) -> None:
    assert cluster.initialize(BUF_POOL_CFG=text) == c.LLM_SUCCESS


@pytest.mark.shows("cpp.OPTION_TRANSFER_BACKEND", "cpp.SetRole")
def test_with_a_transfer_backend_the_address_stays(cluster: Cluster) -> None:
    address = f"127.0.0.1:{free_port()}"
    cluster.start(LISTEN_IP_INFO=address, ENABLE_SET_ROLE="1", TRANSFER_BACKEND="hixl")
    set_role = cluster.datadist.SetRole
    elsewhere = {c.OPTION_LISTEN_IP_INFO: LISTEN}
    assert set_role(c.LlmRole.kMix, elsewhere) == c.LLM_FEATURE_NOT_ENABLED
    assert set_role(c.LlmRole.kMix, {c.OPTION_LISTEN_IP_INFO: address}) == c.LLM_SUCCESS
    assert set_role(c.LlmRole.kMix) == c.LLM_SUCCESS
    assert str(cluster.datadist.listen_endpoint) == address


@pytest.mark.shows("cpp.OPTION_LISTEN_IP_INFO")
@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_a_cluster_listens_where_the_options_say(
    make_cluster: MakeCluster, host: str, address: str
) -> None:
    ours, peer = make_cluster().start(), make_cluster()
    listen = f"{address}:{free_port()}"
    peer.start(LISTEN_IP_INFO=listen)
    assert str(peer.datadist.listen_endpoint) == listen
    info = c.ClusterInfo(2, 0, [c.IpInfo(host, 0)], [c.IpInfo(host, peer.port)])
    assert ours.datadist.LinkLlmClusters([info]) == (c.LLM_SUCCESS, [c.LLM_SUCCESS])
    assert ours.datadist.listen_endpoint is None


@pytest.mark.shows("cpp.OPTION_DEVICE_ID")
@pytest.mark.parametrize("text", ["0", "7", str(2**31 - 1)])
def test_a_device_is_one_number(cluster: Cluster, text: str) -> None:
    assert cluster.initialize(DEVICE_ID=text) == c.LLM_SUCCESS


@pytest.mark.shows("cpp.OPTION_SYNC_CACHE_WAIT_TIME")
@pytest.mark.parametrize(
    ("settings", "seconds"), [({}, 1.0), ({"SYNC_CACHE_WAIT_TIME": "200"}, 0.2)]
)
def test_a_transfer_waits_for_its_peer_as_long_as_the_option_says(
    cluster: Cluster, victim: NodeProcess, settings: dict[str, str], seconds: float
) -> None:
    port, theirs = victim.call(start_there, 5), victim.call(add_there, 5, SHAPE, 1)
    cluster.start(**settings)
    assert cluster.datadist.LinkLlmClusters([info_of(5, port)], 3000)[0] == c.LLM_SUCCESS
    cache, index = cluster.add(SHAPE), c.CacheIndex(5, theirs)
    victim.pause()
    calls: list[Callable[[], c.Status]] = [
        lambda: cluster.datadist.PullKvBlocks(index, cache, [0], [0]),
        lambda: cluster.datadist.PushKvBlocks(cache, index, [0], [0]),
    ]
    for call in calls:
        begun = time.monotonic()
        with takes_at_most(seconds + 0.75):
            assert call() == c.LLM_TIMEOUT
        assert time.monotonic() - begun >= seconds


@pytest.mark.shows("cpp.OPTION_LOCAL_COMM_RES", "cpp.OPTION_GLOBAL_RESOURCE_CONFIG")
@pytest.mark.parametrize(
    "settings",
    [
        {"LOCAL_COMM_RES": ""},
        {"LOCAL_COMM_RES": '{"version": "1.3"}'},
        {"LOCAL_COMM_RES": "{}"},
        {"GLOBAL_RESOURCE_CONFIG": "no JSON"},
        {"GLOBAL_RESOURCE_CONFIG": ""},
        {"GLOBAL_RESOURCE_CONFIG": '{"comm_resource_config.protocol_desc": ["roce:device"]}'},
    ],
    ids=str,
)
def test_what_is_not_needed_is_accepted(
    make_cluster: MakeCluster, settings: dict[str, str]
) -> None:
    assert_moves(make_cluster().start(**settings), make_cluster().start(LISTEN_IP_INFO=LISTEN))


@pytest.mark.shows("cpp.OPTION_TRANSFER_BACKEND")
def test_clusters_with_a_transfer_backend_link_and_move(make_cluster: MakeCluster) -> None:
    ours, peer = (
        make_cluster().start(TRANSFER_BACKEND="hixl", LISTEN_IP_INFO=LISTEN) for _ in range(2)
    )
    assert_moves(ours, peer)
    assert ours.link(peer) == [c.LLM_ALREADY_LINK]
    stranger = [c.ClusterInfo(77, remote_ip_infos=[c.IpInfo("127.0.0.1", peer.port)])]
    assert ours.datadist.UnlinkLlmClusters(stranger) == (c.LLM_SUCCESS, [c.LLM_SUCCESS])


def assert_moves(ours: Cluster, peer: Cluster) -> None:
    """Links the first to the second, pulls a row from it and pushes another one."""
    assert ours.link(peer) == [c.LLM_SUCCESS]
    source, target = peer.add(SHAPE, seed=1), ours.add(SHAPE, seed=2)
    theirs, mine = make_array(SHAPE, 1), make_array(SHAPE, 2)
    index = c.CacheIndex(peer.cluster_id, source.cache_id, 3)
    assert ours.datadist.PullKvCache(index, target, 1) == c.LLM_SUCCESS
    mine[:, 1] = theirs[:, 3]
    assert np.array_equal(ours.array_of(target), mine)
    assert ours.datadist.PushKvCache(target, index) == c.LLM_SUCCESS
    theirs[:, 3] = mine[:, 0]
    assert np.array_equal(peer.array_of(source), theirs)
