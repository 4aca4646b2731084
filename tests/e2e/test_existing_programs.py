"""What programs written against the reference do: options, roles, threads. Spec 11.1, 12."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import cpp_cluster
import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
)
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info, make_array
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

remote = cpp_cluster.remote

SUCCESS = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
PROMPT, DECODER = LLMRole.PROMPT, LLMRole.DECODER
ANY_PORT = "127.0.0.1:0"
SHAPE = (6, 24, 64)
TABLE = '{"server_list":[{"device":[{}]}]}'


@pytest.fixture
def datadist() -> Iterator[LLMDataDist]:
    """Cluster 2, not initialised yet; finalized after the test."""
    datadist = LLMDataDist(DECODER, 2)
    yield datadist
    datadist.finalize()


def publish(node: Node, seed: int) -> None:
    node.blocks_cache(*SHAPE, seed=seed, key=BlocksCacheKey(0, 0))


def pulls(node: Node, cluster_id: int, seed: int) -> bool:
    """Whether all blocks of a peer arrive, the last one first."""
    cache, blocks = node.blocks_cache(*SHAPE), list(range(SHAPE[1]))
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, blocks, blocks[::-1])
    return np.array_equal(node.arrays[cache.cache_id][:, ::-1], make_array(SHAPE, seed))


def linked_ids(node: Node) -> list[int]:
    return sorted(link.cluster_id for link in node.datadist.links())


# -- options ---------------------------------------------------------------------------------------


def edited_options() -> dict[str, str]:
    """Generated, then changed by hand."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.device_id = 0
    config.sync_kv_timeout = 1
    options = config.generate_options()
    options["llm.SyncKvCacheWaitTime"] = "20000"
    options["llm.listenIpInfo"] = ANY_PORT
    options["framework.of.my.own"] = "x"
    return options


RAW_OPTIONS = {
    "llm.EnableCacheManager": "1",
    "ge.exec.deviceId": "0",
    "llm.listenIpInfo": ANY_PORT,
    "llm.SyncKvCacheWaitTime": "20000",
}


@pytest.mark.shows("relies.11")
@pytest.mark.parametrize("options", [RAW_OPTIONS, edited_options()], ids=["raw", "edited"])
def test_options_written_or_edited_by_hand_work(
    datadist: LLMDataDist, peer: NodeProcess, options: dict[str, str]
) -> None:
    port = peer.call(Node.start, PROMPT, 1, listen_ip_info=ANY_PORT)
    peer.call(publish, 1)
    datadist.init(options)
    assert datadist.listen_endpoint is not None
    assert datadist.link_clusters([cluster_info(port, 1)]) == (SUCCESS, [SUCCESS])
    array = make_array(SHAPE, None)
    desc = CacheDesc(SHAPE[0], [*SHAPE[1:]], DataType.DT_INT8)
    addrs = [int(tensor.ctypes.data) for tensor in array]
    cache = datadist.cache_manager.register_blocks_cache(desc, addrs)
    datadist.cache_manager.pull_blocks(BlocksCacheKey(1, 0), cache, [3], [4])
    assert np.array_equal(array[:, 4], make_array(SHAPE, 1)[:, 3])


@pytest.mark.shows("relies.11")
def test_options_that_do_not_speak_of_the_cache_manager_are_the_v1_mode(
    datadist: LLMDataDist, peer: NodeProcess
) -> None:
    port = peer.call(start_v1)
    datadist.init({"ge.exec.deviceId": "0", "ge.flowGraphMemMaxSize": str(1 << 20)})
    assert datadist.link_clusters([cluster_info(port, 1)]) == (SUCCESS, [SUCCESS])
    manager = datadist.kv_cache_manager
    cache = manager.allocate_blocks_cache(CacheDesc(1, [4, 64], DataType.DT_UINT8))
    manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0], [3])
    assert (manager.get_cache_tensors(cache)[0].numpy()[3] == 7).all()


def start_v1(node: Node) -> int:
    port = node.start(
        PROMPT,
        1,
        enable_cache_manager=False,
        listen_ip_info=ANY_PORT,
        ge_options={"ge.flowGraphMemMaxSize": str(1 << 20)},
    )
    manager = node.datadist.kv_cache_manager
    desc = CacheDesc(1, [4, 64], DataType.DT_UINT8)
    cache = manager.allocate_blocks_cache(desc, BlocksCacheKey(1, 0))
    manager.get_cache_tensors(cache)[0].numpy()[:] = 7
    _kept.append(cache)
    return port


#: caches that nobody may collect
_kept: list[object] = []


@pytest.mark.shows("D16")
@pytest.mark.parametrize("resources", ["", '{"version": "1.3"}', "{}"])
def test_resources_imply_remote_access(
    node: Node, peer: NodeProcess, path: str, resources: str
) -> None:
    port = peer.call(
        Node.start,
        PROMPT,
        1,
        listen_ip_info=ANY_PORT,
        enable_remote_cache_accessible=True,
        transfer_path=path,
    )
    peer.call(publish, 1)
    node.start(DECODER, 2, local_comm_res=resources, transfer_path=path)
    publish(node, 2)
    assert node.link(port, 1) is SUCCESS
    assert pulls(node, 1, 1)
    node.manager.push_blocks(BlocksCacheKey(1, 0), node.caches[1], [5], [6])
    assert peer.call(block, 6) == make_array(SHAPE, 2)[:, 5].tolist()


def block(node: Node, index: int) -> list[list[int]]:
    rows: list[list[int]] = node.arrays[1][:, index].tolist()
    return rows


@pytest.mark.shows("D16")
@pytest.mark.parametrize("settings", [{}, {"enable_cache_manager": True}], ids=str)
def test_remote_access_is_off_unless_something_says_or_implies_it(
    node: Node, peer: NodeProcess, settings: dict[str, Any]
) -> None:
    port = peer.call(Node.start, PROMPT, 1, listen_ip_info=ANY_PORT, local_comm_res="{}")
    node.start(DECODER, 2, **settings)
    assert node.link(port, 1) is INVALID, "the two ends differ"


@pytest.mark.shows("D17")
@pytest.mark.parametrize("resources", ["", "{}"])
def test_resources_with_remote_access_off_are_two_sided(
    node: Node, peer: NodeProcess, resources: str
) -> None:
    port = peer.call(Node.start, PROMPT, 1, listen_ip_info=ANY_PORT)
    peer.call(publish, 1)
    node.start(DECODER, 2, local_comm_res=resources, enable_remote_cache_accessible=False)
    publish(node, 2)
    assert node.link(port, 1) is SUCCESS
    assert pulls(node, 1, 1)
    with pytest.raises(LLMException) as error:
        node.manager.push_blocks(BlocksCacheKey(1, 0), node.caches[1], [0], [0])
    assert error.value.status_code is INVALID


# -- who listens -----------------------------------------------------------------------------------


@pytest.mark.shows("relies.12", "datadist.links")
@pytest.mark.parametrize("listens", [(PROMPT,), (DECODER,), (PROMPT, DECODER)], ids=str)
@pytest.mark.parametrize("role", [PROMPT, DECODER])
def test_whoever_listens_is_linked_to(
    node: Node, peer: NodeProcess, role: LLMRole, listens: tuple[LLMRole, ...]
) -> None:
    def settings(role: LLMRole) -> dict[str, str]:
        return {"listen_ip_info": ANY_PORT} if role in listens else {}

    other = DECODER if role is PROMPT else PROMPT
    theirs = peer.call(Node.start, other, 1, **settings(other))
    ours = node.start(role, 2, **settings(role))
    peer.call(publish, 1)
    publish(node, 2)
    assert [ours > 0, theirs > 0] == [role in listens, other in listens]
    if ours:
        assert peer.call(Node.link, ours, 2) is SUCCESS
    else:
        assert node.link(theirs, 1) is SUCCESS
    assert pulls(node, 1, 1)
    assert peer.call(pulls, 2, 2)


@pytest.mark.shows("relies.12")
def test_neither_need_listen_for_a_rank_table_link(node: Node, peer: NodeProcess) -> None:
    peer.call(Node.start, PROMPT, 1)
    node.start(DECODER, 2)
    assert node.datadist.listen_endpoint is None
    peer.call(publish, 1)
    name = f"neither-{os.getpid()}"
    assert [peer.call(link_ranks, name), link_ranks(node, name)] == [1, 1]
    assert eventually(lambda: status_of(node) is not RegisterMemStatus.PREPARING)
    assert pulls(node, 1, 1)


def link_ranks(node: Node, name: str) -> int:
    return node.datadist.link(name, {1: 0, 2: 1}, TABLE)


def status_of(node: Node) -> RegisterMemStatus:
    return node.datadist.query_register_mem_status(1)


# -- many ------------------------------------------------------------------------------------------

MANY = 33


@pytest.mark.shows("D10", "link.parallel", "relies.4")
def test_more_than_sixteen_clusters_are_linked_and_unlinked_in_a_call(
    node: Node, remote: NodeProcess
) -> None:
    ids = range(100, 100 + MANY)
    infos = [cluster_info(remote.call(cpp_cluster.start_there, each), each) for each in ids]
    cache_ids = [remote.call(cpp_cluster.add_there, each, (2, 4, 64), each) for each in ids]
    node.start(DECODER, 2, enable_remote_cache_accessible=True)
    assert node.datadist.link_clusters(infos, 20_000) == (SUCCESS, [SUCCESS] * MANY)
    assert linked_ids(node) == [*ids]
    for each, cache_id in zip(ids, cache_ids, strict=True):
        row = node.rows_cache(2, 1, 64)
        node.manager.pull_cache(CacheKeyByIdAndIndex(each, cache_id, 3), row)
        expected = make_array((2, 4, 64), each)[:, 3]
        assert np.array_equal(node.arrays[row.cache_id][:, 0], expected)
    assert node.datadist.unlink_clusters(infos, 20_000) == (SUCCESS, [SUCCESS] * MANY)
    assert linked_ids(node) == []


# -- threads ---------------------------------------------------------------------------------------


@pytest.mark.shows("relies.13")
def test_a_listener_pushes_from_twelve_threads(node: Node, peer: NodeProcess, path: str) -> None:
    """One layer of one tensor each at a time, over the link that its caller made."""
    settings: dict[str, Any] = {
        "enable_remote_cache_accessible": True,
        "transfer_path": path,
        "sync_kv_timeout": 20_000,
    }
    port = node.start(PROMPT, 2, listen_ip_info=ANY_PORT, **settings)
    peer.call(Node.start, DECODER, 1, **settings)
    assert peer.call(Node.link, port, 2) is SUCCESS
    peer.call(publish, 1)
    source = node.blocks_cache(*SHAPE, seed=2)

    def push(thread: int) -> None:
        """The two blocks of this thread."""
        src, dst = [thread, thread + 12], [23 - thread, 11 - thread]
        for tensor in range(SHAPE[0]):
            layer = range(tensor, tensor + 1)
            node.manager.push_blocks(
                BlocksCacheKey(1, 0),
                source,
                src,
                dst,
                src_layer_range=layer,
                dst_layer_range=layer,
                tensor_num_per_layer=1,
            )

    with ThreadPoolExecutor(12) as pool:
        for call in [pool.submit(push, thread) for thread in range(12)]:
            call.result(40)
    assert np.array_equal(peer.call(array_of, 1)[:, ::-1], node.arrays[source.cache_id])


def array_of(node: Node, cache_id: int) -> Any:
    return node.arrays[cache_id]


@pytest.mark.shows("relies.15")
def test_linking_asking_and_pulling_are_different_threads_work(
    node: Node, peer: NodeProcess
) -> None:
    peer.call(Node.start, PROMPT, 1)
    peer.call(publish, 1)
    node.start(DECODER, 2, sync_kv_timeout=20_000)
    comm_ids: list[int] = []
    name = f"threads-{os.getpid()}"
    linked, pulled = threading.Event(), threading.Event()

    def link() -> None:
        for index in range(4):
            comm_ids.append(link_ranks(node, f"{name}-{index}"))
            pulled.wait(20)

    def ask() -> RegisterMemStatus:
        assert eventually(lambda: bool(comm_ids))
        assert eventually(lambda: status_of(node) is not RegisterMemStatus.PREPARING)
        linked.set()
        return status_of(node)

    def pull(_: int) -> bool:
        assert linked.wait(20)
        return pulls(node, 1, 1)

    with ThreadPoolExecutor(34) as pool:
        asking, linking = pool.submit(ask), pool.submit(link)
        pulling = [pool.submit(pull, thread) for thread in range(32)]
        peer.call(link_ranks, f"{name}-0")
        right = [call.result(40) for call in pulling]
        pulled.set()
        linking.result(20)
    assert asking.result() is RegisterMemStatus.OK
    assert right == [True] * 32
    assert comm_ids == [1, 2, 3, 4]
