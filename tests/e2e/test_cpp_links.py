"""The C++-shaped interface: linking and unlinking."""

from __future__ import annotations

import socket
import time
from contextlib import closing
from typing import TYPE_CHECKING

import cpp_cluster
import pytest
from cpp_cluster import LISTEN, LOCAL, NOBODY, Cluster, info_of, start_there

from llm_datadist import cpp as c
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from cpp_cluster import MakeCluster

    from llm_datadist.testing.cluster import NodeProcess

make_cluster = cpp_cluster.make_cluster
cluster = cpp_cluster.cluster


@pytest.mark.shows("cpp.LinkLlmClusters", "cpp.UnlinkLlmClusters")
@pytest.mark.parametrize(
    "info",
    [
        c.ClusterInfo(2, 0, [LOCAL], [c.IpInfo("", 26000)]),
        c.ClusterInfo(2, 0, [LOCAL], [c.IpInfo("127.0.0.256", 26000)]),
        c.ClusterInfo(2, 0, [LOCAL], [c.IpInfo("somewhere", 26000)]),
        c.ClusterInfo(2, 0, [c.IpInfo("", 0)], [NOBODY]),
        c.ClusterInfo(2, 0, [LOCAL], [c.IpInfo("127.0.0.1", 65536)]),
        c.ClusterInfo(-1, 0, [LOCAL], [NOBODY]),
    ],
    ids=str,
)
def test_one_address_that_is_none_refuses_the_whole_call(
    make_cluster: MakeCluster, info: c.ClusterInfo
) -> None:
    ours, peer = make_cluster().start(), make_cluster().start(LISTEN_IP_INFO=LISTEN)
    infos = [info_of(2, peer.port), info]
    assert ours.datadist.LinkLlmClusters(infos) == (c.LLM_PARAM_INVALID, [])
    assert ours.datadist.UnlinkLlmClusters(infos) == (c.LLM_PARAM_INVALID, [])
    assert ours.datadist.links() == []


@pytest.mark.shows("cpp.LinkLlmClusters", "cpp.UnlinkLlmClusters")
@pytest.mark.parametrize("timeout", [0, -1, 2**31])
def test_a_timeout_that_is_none_is_invalid(cluster: Cluster, timeout: int) -> None:
    infos = [c.ClusterInfo(2, 0, [LOCAL], [NOBODY])]
    cluster.start()
    assert cluster.datadist.LinkLlmClusters(infos, timeout) == (c.LLM_PARAM_INVALID, [])
    assert cluster.datadist.UnlinkLlmClusters(infos, timeout) == (c.LLM_PARAM_INVALID, [])


@pytest.mark.shows("cpp.LinkLlmClusters", "cpp.UnlinkLlmClusters")
def test_no_clusters_are_invalid(cluster: Cluster) -> None:
    cluster.start()
    assert cluster.datadist.LinkLlmClusters([]) == (c.LLM_PARAM_INVALID, [])
    assert cluster.datadist.UnlinkLlmClusters([]) == (c.LLM_PARAM_INVALID, [])


@pytest.mark.shows("cpp.LinkLlmClusters")
def test_each_cluster_gets_its_status_and_the_last_failure_is_the_calls(
    make_cluster: MakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    ours, peer = make_cluster().start(), make_cluster().start(LISTEN_IP_INFO=LISTEN)
    two = c.ClusterInfo(7, 0, [LOCAL], [NOBODY, NOBODY])
    refused = c.ClusterInfo(8, 0, [LOCAL], [NOBODY])
    answer = ours.datadist.LinkLlmClusters([refused, two, info_of(2, peer.port)])
    statuses = [c.LLM_LINK_FAILED, c.LLM_PARAM_INVALID, c.LLM_SUCCESS]
    assert answer == (c.LLM_PARAM_INVALID, statuses)
    assert [link.cluster_id for link in ours.datadist.links()] == [2]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "cluster 7: 2 remote addresses" in line
    assert "cluster 8: cannot connect to 127.0.0.1:9" in line


@pytest.mark.shows("cpp.LinkLlmClusters", "cpp.UnlinkLlmClusters")
def test_linking_again_says_so_and_unlinking_again_is_success(
    make_cluster: MakeCluster,
) -> None:
    ours, peer = make_cluster().start(), make_cluster().start(LISTEN_IP_INFO=LISTEN)
    infos = [info_of(2, peer.port)]
    assert ours.link(peer) == [c.LLM_SUCCESS]
    assert ours.link(peer) == [c.LLM_ALREADY_LINK]
    for _ in range(2):
        assert ours.datadist.UnlinkLlmClusters(infos) == (c.LLM_SUCCESS, [c.LLM_SUCCESS])
        assert ours.datadist.links() == peer.datadist.links() == []
    assert ours.link(peer) == [c.LLM_SUCCESS]


@pytest.mark.shows("cpp.LinkLlmClusters")
def test_an_unknown_remote_id_links_to_whoever_listens_there(
    make_cluster: MakeCluster,
) -> None:
    ours, peer = make_cluster().start(), make_cluster().start(LISTEN_IP_INFO=LISTEN)
    assert ours.datadist.LinkLlmClusters([info_of(0, peer.port)])[0] == c.LLM_SUCCESS
    assert [link.cluster_id for link in ours.datadist.links()] == [2]


@pytest.mark.shows("cpp.UnlinkLlmClusters")
def test_the_end_that_was_linked_to_may_unlink(make_cluster: MakeCluster) -> None:
    ours, peer = make_cluster().start(LISTEN_IP_INFO=LISTEN), make_cluster().start()
    caller = c.ClusterInfo(2, 0, [LOCAL], [NOBODY])
    for force in (False, True):
        assert peer.link(ours) == [c.LLM_SUCCESS]
        answer = ours.datadist.UnlinkLlmClusters([caller], 1000, force)
        assert answer == (c.LLM_SUCCESS, [c.LLM_SUCCESS])
        assert ours.datadist.links() == []
        assert eventually(lambda: peer.datadist.links() == [])


@pytest.mark.shows("cpp.UnlinkLlmClusters")
def test_the_link_to_a_peer_that_stands_still_ends_by_force_alone(
    cluster: Cluster, victim: NodeProcess
) -> None:
    infos = [info_of(5, victim.call(start_there, 5))]
    cluster.start()
    assert cluster.datadist.LinkLlmClusters(infos, 3000)[0] == c.LLM_SUCCESS
    victim.pause()
    assert cluster.datadist.UnlinkLlmClusters(infos, 200) == (c.LLM_TIMEOUT, [c.LLM_TIMEOUT])
    assert [link.cluster_id for link in cluster.datadist.links()] == [5]
    answer = cluster.datadist.UnlinkLlmClusters(infos, 200, force_flag=True)
    assert answer == (c.LLM_SUCCESS, [c.LLM_SUCCESS])
    assert cluster.datadist.links() == []


@pytest.mark.shows("cpp.UnlinkLlmClusters")
def test_unlinking_by_force_needs_no_peer_and_no_address(
    make_cluster: MakeCluster,
) -> None:
    ours, peer = make_cluster().start(), make_cluster().start(LISTEN_IP_INFO=LISTEN)
    assert ours.link(peer) == [c.LLM_SUCCESS]
    info = c.ClusterInfo(remote_cluster_id=2)
    assert ours.datadist.UnlinkLlmClusters([info]) == (c.LLM_PARAM_INVALID, [c.LLM_PARAM_INVALID])
    answer = ours.datadist.UnlinkLlmClusters([info], force_flag=True)
    assert answer == (c.LLM_SUCCESS, [c.LLM_SUCCESS])
    assert ours.datadist.links() == []


@pytest.mark.shows("cpp.LinkLlmClusters", "cpp.UnlinkLlmClusters")
def test_a_peer_that_cannot_be_reached_or_is_silent(cluster: Cluster) -> None:
    cluster.start()
    away = [c.ClusterInfo(2, 0, [LOCAL], [NOBODY])]
    assert cluster.datadist.LinkLlmClusters(away) == (c.LLM_LINK_FAILED, [c.LLM_LINK_FAILED])
    assert cluster.datadist.UnlinkLlmClusters(away) == (c.LLM_UNLINK_FAILED, [c.LLM_UNLINK_FAILED])
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        infos = [info_of(2, silent.getsockname()[1])]
        assert cluster.datadist.LinkLlmClusters(infos, 200) == (c.LLM_TIMEOUT, [c.LLM_TIMEOUT])
        assert cluster.datadist.UnlinkLlmClusters(infos, 200) == (c.LLM_TIMEOUT, [c.LLM_TIMEOUT])


@pytest.mark.shows("cpp.LinkLlmClusters", "cpp.UnlinkLlmClusters")
@pytest.mark.parametrize("name", ["LinkLlmClusters", "UnlinkLlmClusters"])
def test_a_timeout_is_a_second_unless_given(cluster: Cluster, name: str) -> None:
    cluster.start()
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        infos, begun = [info_of(2, silent.getsockname()[1])], time.monotonic()
        with takes_at_most(1.75):
            answer = getattr(cluster.datadist, name)(infos)
        assert answer == (c.LLM_TIMEOUT, [c.LLM_TIMEOUT])
        assert time.monotonic() - begun >= 1
