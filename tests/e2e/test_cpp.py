"""The C++-shaped interface: the life of its instances, and what is beside them."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import cpp_cluster
import numpy as np
import pytest
from cpp_cluster import LISTEN, SHAPE, Cluster, describe, info_of

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist import cpp as c
from llm_datadist.testing.cluster import Node, NodeProcess, free_port, make_array

if TYPE_CHECKING:
    from cpp_cluster import MakeCluster

make_cluster = cpp_cluster.make_cluster
cluster = cpp_cluster.cluster


@pytest.mark.shows("cpp.Initialize")
def test_initialize_again_is_success_and_changes_nothing(cluster: Cluster) -> None:
    cluster.start(LISTEN_IP_INFO=LISTEN)
    port = cluster.port
    assert cluster.initialize(LISTEN_IP_INFO="no address") == c.LLM_SUCCESS
    assert cluster.port == port


@pytest.mark.shows("cpp.Initialize")
@pytest.mark.parametrize(
    ("cluster_id", "role"), [(1, c.LlmRole.kEnd), (2**64, c.LlmRole.kMix), (-1, c.LlmRole.kMix)]
)
def test_a_role_or_an_id_that_is_none_is_invalid(
    make_cluster: MakeCluster, cluster_id: int, role: c.LlmRole
) -> None:
    assert make_cluster(cluster_id, role).initialize() == c.LLM_PARAM_INVALID


@pytest.mark.shows("cpp.Initialize", "cpp.Finalize")
def test_an_address_in_use_fails_and_can_be_tried_again(
    make_cluster: MakeCluster,
) -> None:
    first, second = make_cluster().start(LISTEN_IP_INFO=LISTEN), make_cluster()
    taken = f"127.0.0.1:{first.port}"
    assert second.initialize(LISTEN_IP_INFO=taken) == c.LLM_FAILED
    first.datadist.Finalize()
    assert second.initialize(LISTEN_IP_INFO=taken) == c.LLM_SUCCESS


@pytest.mark.shows("cpp.Finalize")
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


@pytest.mark.shows("cpp.not_initialised")
@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("name", "args"), CALLS, ids=[name for name, _ in CALLS])
def test_before_initialize_and_after_finalize_all_fails_with_one_line_in_the_log(
    cluster: Cluster,
    name: str,
    args: tuple[Any, ...],
    is_after: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if is_after:
        cluster.start().datadist.Finalize()
    caplog.clear()
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


@pytest.mark.shows("cpp.SetRole", "cpp.OPTION_ENABLE_SET_ROLE")
def test_set_role_needs_its_option(cluster: Cluster) -> None:
    cluster.start(LISTEN_IP_INFO=LISTEN)
    assert cluster.datadist.SetRole(c.LlmRole.kPrompt) == c.LLM_FEATURE_NOT_ENABLED
    cluster.datadist.Finalize()
    cluster.start(ENABLE_SET_ROLE="0")
    assert cluster.datadist.SetRole(c.LlmRole.kPrompt) == c.LLM_FEATURE_NOT_ENABLED


@pytest.mark.shows("cpp.SetRole", "cpp.OPTION_ENABLE_SET_ROLE")
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


@pytest.mark.shows("cpp.SetRole")
def test_the_same_address_again_changes_nothing_and_another_moves(
    make_cluster: MakeCluster,
) -> None:
    moving, peer = make_cluster(), make_cluster().start()
    port = moving.start(LISTEN_IP_INFO=LISTEN, ENABLE_SET_ROLE="1").port
    others = {c.OPTION_DEVICE_ID: "0", c.OPTION_SYNC_CACHE_WAIT_TIME: "2000", "any": "thing"}
    for role in (c.LlmRole.kPrompt, c.LlmRole.kPrompt, c.LlmRole.kDecoder):
        options = {c.OPTION_LISTEN_IP_INFO: f"127.0.0.1:{port}", **others}
        assert moving.datadist.SetRole(role, options) == c.LLM_SUCCESS
        assert moving.port == port
    elsewhere = {c.OPTION_LISTEN_IP_INFO: f"127.0.0.2:{port}"}
    assert moving.datadist.SetRole(c.LlmRole.kMix, elsewhere) == c.LLM_SUCCESS
    assert peer.link(moving) == [c.LLM_LINK_FAILED]
    info = c.ClusterInfo(1, remote_ip_infos=[c.IpInfo("127.0.0.2", port)])
    assert peer.datadist.LinkLlmClusters([info])[0] == c.LLM_SUCCESS


@pytest.mark.shows("cpp.SetRole")
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


# -- beside others --


@pytest.mark.shows("cpp.instances")
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
