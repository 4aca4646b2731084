"""The C++-shaped interface: the life of its instances, their links, and what is beside them."""

from __future__ import annotations

import logging
import resource
import socket
import subprocess
import sys
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cpp_cluster import (
    LISTEN,
    LOCAL,
    NOBODY,
    SHAPE,
    Cluster,
    clusters,
    describe,
    free_port,
    info_of,
    pool_cfg,
    pool_class,
)

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist import cpp as c
from llm_datadist.testing.cluster import Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpp_cluster import MakeCluster


@pytest.fixture
def make_cluster() -> Iterator[MakeCluster]:
    with clusters() as make:
        yield make


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    """Not initialised yet."""
    return make_cluster()


# -- Initialize, Finalize --


def test_initialize_again_is_success_and_changes_nothing(cluster: Cluster) -> None:
    cluster.start(LISTEN_IP_INFO=LISTEN)
    port = cluster.port
    assert cluster.initialize(LISTEN_IP_INFO="no address") == c.LLM_SUCCESS
    assert cluster.port == port


@pytest.mark.parametrize(
    "options",
    [
        {},
        {c.OPTION_DEVICE_ID: ""},
        {c.OPTION_DEVICE_ID: "0;1"},
        {c.OPTION_DEVICE_ID: "-1"},
        {c.OPTION_LISTEN_IP_INFO: "127.0.0.1"},
        {c.OPTION_LISTEN_IP_INFO: "127.0.0.1:one"},
        {c.OPTION_LISTEN_IP_INFO: "127.0.0.1:65536"},
        {c.OPTION_LISTEN_IP_INFO: "localhost:26000"},
        {c.OPTION_LISTEN_IP_INFO: "127.0.0.1:26000;127.0.0.1:26001"},
        {c.OPTION_SYNC_CACHE_WAIT_TIME: "1s"},
        {c.OPTION_SYNC_CACHE_WAIT_TIME: "-1"},
        {c.OPTION_ENABLE_SET_ROLE: "2"},
        {c.OPTION_TRANSFER_BACKEND: "other", c.OPTION_LISTEN_IP_INFO: LISTEN},
    ],
    ids=str,
)
def test_options_that_cannot_be_are_invalid(cluster: Cluster, options: dict[str, str]) -> None:
    needed = {} if not options or c.OPTION_DEVICE_ID in options else {c.OPTION_DEVICE_ID: "0"}
    assert cluster.datadist.Initialize({**needed, **options}) == c.LLM_PARAM_INVALID
    assert cluster.initialize() == c.LLM_SUCCESS


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"buf_cfg": {}}',
        '{"buf_pool_size": -1}',
        '{"buf_cfg": [{"total_size": 2097152, "blk_size": 256}]}',
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


@pytest.mark.parametrize(
    "text",
    [
        pool_cfg(pool_class(), buf_pool_size=2147483648),
        pool_cfg(pool_class(), buf_pool_size=1024),
        pool_cfg(),
        "{}",
    ],
)
def test_a_buffer_pool_of_the_documented_form_is_accepted(cluster: Cluster, text: str) -> None:
    assert cluster.initialize(BUF_POOL_CFG=text) == c.LLM_SUCCESS


@pytest.mark.parametrize(
    ("cluster_id", "role"), [(1, c.LlmRole.kEnd), (2**64, c.LlmRole.kMix), (-1, c.LlmRole.kMix)]
)
def test_a_role_or_an_id_that_is_none_is_invalid(
    make_cluster: MakeCluster, cluster_id: int, role: c.LlmRole
) -> None:
    assert make_cluster(cluster_id, role).initialize() == c.LLM_PARAM_INVALID


def test_an_address_in_use_fails_and_can_be_tried_again(
    make_cluster: MakeCluster,
) -> None:
    first, second = make_cluster().start(LISTEN_IP_INFO=LISTEN), make_cluster()
    taken = f"127.0.0.1:{first.port}"
    assert second.initialize(LISTEN_IP_INFO=taken) == c.LLM_FAILED
    first.datadist.Finalize()
    assert second.initialize(LISTEN_IP_INFO=taken) == c.LLM_SUCCESS


def test_finalize_may_be_repeated_and_ids_start_anew_after_it(cluster: Cluster) -> None:
    cluster.datadist.Finalize()
    cluster.start(LISTEN_IP_INFO=LISTEN)
    assert [cluster.add().cache_id, cluster.allocate(SHAPE).cache_id] == [1, 2]
    port = cluster.port
    cluster.datadist.Finalize()
    cluster.datadist.Finalize()
    cluster.start(LISTEN_IP_INFO=f"127.0.0.1:{port}")
    assert cluster.add().cache_id == 1


def test_a_process_without_descriptors_left_is_told_so(victim: NodeProcess) -> None:
    assert victim.call(initialize_without_descriptors) == c.LLM_FAILED


def initialize_without_descriptors(node: Node) -> c.Status:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
    return Cluster(1).initialize()


def test_wrong_types_are_type_errors(cluster: Cluster) -> None:
    with pytest.raises(TypeError):
        c.LlmDataDist("1", c.LlmRole.kMix)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        c.LlmDataDist(1, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        cluster.datadist.Initialize({c.OPTION_DEVICE_ID: 0})  # type: ignore[dict-item]
    cluster.start()
    with pytest.raises(TypeError):
        cluster.datadist.RegisterKvCache(describe(SHAPE), ["1"] * 6)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        cluster.datadist.PullKvCache(BlocksCacheKey(1, 0), c.Cache())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        cluster.datadist.UnregisterKvCache(True)


ANY = c.CacheIndex(2, 1)
CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("SetRole", (c.LlmRole.kMix,)),
    ("LinkLlmClusters", ([],)),
    ("UnlinkLlmClusters", ([],)),
    ("PullKvCache", (ANY, c.Cache())),
    ("PullKvBlocks", (ANY, c.Cache(), [0], [0])),
    ("PushKvCache", (c.Cache(), ANY)),
    ("PushKvBlocks", (c.Cache(), ANY, [0], [0])),
    ("RegisterKvCache", (describe(SHAPE), [1] * 6)),
    ("UnregisterKvCache", (1,)),
    ("AllocateCache", (describe(SHAPE),)),
    ("DeallocateCache", (1,)),
    ("CopyKvCache", (c.Cache(), c.Cache())),
    ("CopyKvBlocks", (c.Cache(), c.Cache(), [0], [[0]])),
]


@pytest.mark.parametrize(("name", "args"), CALLS, ids=[name for name, _ in CALLS])
def test_before_initialize_everything_fails_with_one_line_in_the_log(
    cluster: Cluster, name: str, args: tuple[Any, ...], caplog: pytest.LogCaptureFixture
) -> None:
    answer = getattr(cluster.datadist, name)(*args)
    status = answer[0] if isinstance(answer, tuple) else answer
    assert status == c.LLM_FAILED
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (
            logging.ERROR,
            f"{name} of cluster 1 failed with LLMStatusCode.LLM_FAILED: "
            "not initialised: call Initialize first",
        )
    ]


# -- SetRole --


def test_set_role_needs_its_option(cluster: Cluster) -> None:
    cluster.start(LISTEN_IP_INFO=LISTEN)
    assert cluster.datadist.SetRole(c.LlmRole.kPrompt) == c.LLM_FEATURE_NOT_ENABLED
    cluster.datadist.Finalize()
    cluster.start(ENABLE_SET_ROLE="0")
    assert cluster.datadist.SetRole(c.LlmRole.kPrompt) == c.LLM_FEATURE_NOT_ENABLED


def test_set_role_opens_moves_and_closes_the_listener(
    make_cluster: MakeCluster,
) -> None:
    moving, peer = make_cluster().start(ENABLE_SET_ROLE="1"), make_cluster().start()
    assert moving.port == 0
    ports = []
    for _ in range(2):
        free = f"127.0.0.1:{free_port()}"
        options = {c.OPTION_LISTEN_IP_INFO: free}
        assert moving.datadist.SetRole(c.LlmRole.kPrompt, options) == c.LLM_SUCCESS
        assert str(moving.datadist.listen_endpoint) == free
        assert peer.link(moving) == [c.LLM_SUCCESS]
        assert moving.datadist.SetRole(c.LlmRole.kMix, options) == c.LLM_EXIST_LINK
        peers = [c.ClusterInfo(remote_cluster_id=2)]
        assert moving.datadist.UnlinkLlmClusters(peers, force_flag=True)[0] == c.LLM_SUCCESS
        ports.append(moving.port)
    assert moving.datadist.SetRole(c.LlmRole.kDecoder) == c.LLM_SUCCESS
    assert moving.datadist.listen_endpoint is None
    infos = [info_of(1, port) for port in ports]
    assert peer.datadist.LinkLlmClusters(infos)[1] == [c.LLM_LINK_FAILED] * 2


def test_a_role_that_cannot_be_taken_leaves_all_as_it_was(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster().start(LISTEN_IP_INFO=LISTEN, ENABLE_SET_ROLE="1")
    other = make_cluster().start(LISTEN_IP_INFO=LISTEN)
    port = cluster.port
    set_role = cluster.datadist.SetRole
    assert set_role(c.LlmRole.kEnd) == c.LLM_PARAM_INVALID
    assert set_role(c.LlmRole.kMix, {c.OPTION_LISTEN_IP_INFO: "x"}) == c.LLM_PARAM_INVALID
    taken = {c.OPTION_LISTEN_IP_INFO: f"127.0.0.1:{other.port}"}
    assert set_role(c.LlmRole.kMix, taken) == c.LLM_FAILED
    assert cluster.port == port
    assert other.link(cluster) == [c.LLM_SUCCESS]


def test_with_a_transfer_backend_the_address_stays(cluster: Cluster) -> None:
    address = f"127.0.0.1:{free_port()}"
    cluster.start(LISTEN_IP_INFO=address, ENABLE_SET_ROLE="1", TRANSFER_BACKEND="hixl")
    set_role = cluster.datadist.SetRole
    elsewhere = {c.OPTION_LISTEN_IP_INFO: LISTEN}
    assert set_role(c.LlmRole.kMix, elsewhere) == c.LLM_FEATURE_NOT_ENABLED
    assert set_role(c.LlmRole.kMix, {c.OPTION_LISTEN_IP_INFO: address}) == c.LLM_SUCCESS
    assert set_role(c.LlmRole.kMix) == c.LLM_SUCCESS
    assert str(cluster.datadist.listen_endpoint) == address


# -- links --


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


@pytest.mark.parametrize("timeout", [0, -1, 2**31])
def test_a_timeout_that_is_none_is_invalid(cluster: Cluster, timeout: int) -> None:
    infos = [c.ClusterInfo(2, 0, [LOCAL], [NOBODY])]
    cluster.start()
    assert cluster.datadist.LinkLlmClusters(infos, timeout) == (c.LLM_PARAM_INVALID, [])
    assert cluster.datadist.UnlinkLlmClusters(infos, timeout) == (c.LLM_PARAM_INVALID, [])


def test_no_clusters_are_invalid(cluster: Cluster) -> None:
    cluster.start()
    assert cluster.datadist.LinkLlmClusters([]) == (c.LLM_PARAM_INVALID, [])
    assert cluster.datadist.UnlinkLlmClusters([]) == (c.LLM_PARAM_INVALID, [])


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


def test_linking_again_says_so_and_unlinking_again_is_success(
    make_cluster: MakeCluster,
) -> None:
    ours, peer = make_cluster().start(), make_cluster().start(LISTEN_IP_INFO=LISTEN)
    infos = [info_of(2, peer.port)]
    assert ours.link(peer) == [c.LLM_SUCCESS]
    assert ours.link(peer) == [c.LLM_ALREADY_LINK]
    for _ in range(2):
        assert ours.datadist.UnlinkLlmClusters(infos) == (c.LLM_SUCCESS, [c.LLM_SUCCESS])
        assert ours.datadist.links() == []
    assert ours.link(peer) == [c.LLM_SUCCESS]


def test_an_unknown_remote_id_links_to_whoever_listens_there(
    make_cluster: MakeCluster,
) -> None:
    ours, peer = make_cluster().start(), make_cluster().start(LISTEN_IP_INFO=LISTEN)
    assert ours.datadist.LinkLlmClusters([info_of(0, peer.port)])[0] == c.LLM_SUCCESS
    assert [link.cluster_id for link in ours.datadist.links()] == [2]


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


def test_a_peer_that_cannot_be_reached_or_is_silent(cluster: Cluster) -> None:
    cluster.start()
    away = [c.ClusterInfo(2, 0, [LOCAL], [NOBODY])]
    assert cluster.datadist.LinkLlmClusters(away) == (c.LLM_LINK_FAILED, [c.LLM_LINK_FAILED])
    assert cluster.datadist.UnlinkLlmClusters(away) == (c.LLM_UNLINK_FAILED, [c.LLM_UNLINK_FAILED])
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        infos = [info_of(2, silent.getsockname()[1])]
        assert cluster.datadist.LinkLlmClusters(infos, 200) == (c.LLM_TIMEOUT, [c.LLM_TIMEOUT])
        assert cluster.datadist.UnlinkLlmClusters(infos, 200) == (c.LLM_TIMEOUT, [c.LLM_TIMEOUT])


# -- beside others --


def test_a_python_cluster_of_the_same_process_is_a_peer(cluster: Cluster, node: Node) -> None:
    cluster.start(LISTEN_IP_INFO=LISTEN)
    node.start(LLMRole.DECODER, 2, enable_remote_cache_accessible=True)
    assert node.link(cluster.port, 1) == LLMStatusCode.LLM_SUCCESS
    theirs = node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(2, 0))
    hidden = node.blocks_cache(*SHAPE, seed=1, remote_accessible=False)
    cache = cluster.add(SHAPE)
    pull = cluster.datadist.PullKvBlocks
    assert pull(c.CacheIndex(2, theirs.cache_id), cache, [0], [7]) == c.LLM_SUCCESS
    assert np.array_equal(cluster.array_of(cache)[:, 7], make_array(SHAPE, 1)[:, 0])
    assert pull(c.CacheIndex(2, hidden.cache_id), cache, [0], [7]) == c.LLM_PARAM_INVALID


def test_a_python_cluster_in_two_sided_mode_is_no_peer(cluster: Cluster, node: Node) -> None:
    port = node.start(LLMRole.PROMPT, 2, listen_ip_info=LISTEN)
    infos = [info_of(2, port)]
    answer = cluster.start().datadist.LinkLlmClusters(infos)
    assert answer == (c.LLM_PARAM_INVALID, [c.LLM_PARAM_INVALID])


def test_an_instance_that_is_dropped_is_finalized(make_cluster: MakeCluster) -> None:
    dropped = c.LlmDataDist(7, c.LlmRole.kMix)
    address = f"127.0.0.1:{free_port()}"
    options = {c.OPTION_DEVICE_ID: "0", c.OPTION_LISTEN_IP_INFO: address}
    assert dropped.Initialize(options) == c.LLM_SUCCESS
    assert make_cluster().initialize(LISTEN_IP_INFO=address) == c.LLM_FAILED
    del dropped
    assert make_cluster().initialize(LISTEN_IP_INFO=address) == c.LLM_SUCCESS


class Dropper(logging.Handler):
    """Drops the last reference to an instance in the thread that logs its link."""

    def __init__(self, held: list[c.LlmDataDist]) -> None:
        super().__init__(logging.INFO)
        self._held = held
        self.thread_name = ""
        self.done = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("cluster 7 is linked"):
            self.thread_name = threading.current_thread().name
            self._held.clear()
            self.done.set()


def test_an_instance_may_be_dropped_in_its_own_thread(
    make_cluster: MakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the garbage collector runs is not the program's choice."""
    address = f"127.0.0.1:{free_port()}"
    held = [c.LlmDataDist(7, c.LlmRole.kMix)]
    options = {c.OPTION_DEVICE_ID: "0", c.OPTION_LISTEN_IP_INFO: address}
    assert held[0].Initialize(options) == c.LLM_SUCCESS
    dropper, logger = Dropper(held), logging.getLogger("LLM_DATADIST")
    logger.addHandler(dropper)
    try:
        with caplog.at_level(logging.INFO, "LLM_DATADIST"):
            make_cluster().start().datadist.LinkLlmClusters([info_of(7, int(address[10:]))], 3000)
            assert dropper.done.wait(10)
    finally:
        logger.removeHandler(dropper)
    assert dropper.thread_name == "llm-datadist-loop"
    for thread in threading.enumerate():
        if thread.name == "llm-datadist-end":
            thread.join(10)
    assert make_cluster().initialize(LISTEN_IP_INFO=address) == c.LLM_SUCCESS


_LEFT_OVER = """
from llm_datadist import cpp as c
a, b = c.LlmDataDist(1, c.LlmRole.kMix), c.LlmDataDist(2, c.LlmRole.kMix)
options = {c.OPTION_DEVICE_ID: "0"}
assert a.Initialize({**options, c.OPTION_LISTEN_IP_INFO: "127.0.0.1:0"}) == c.LLM_SUCCESS
assert b.Initialize(options) == c.LLM_SUCCESS
info = c.ClusterInfo(1, remote_ip_infos=[c.IpInfo("127.0.0.1", a.listen_endpoint.port)])
assert b.LinkLlmClusters([info])[0] == c.LLM_SUCCESS
"""


def test_a_program_may_end_without_finalize() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LEFT_OVER], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
