"""The life of a cluster: init, finalize, and what they leave behind here and at its peers."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
    TransferWithCacheKeyConfig,
)
from llm_datadist.testing.cluster import Node, NodeProcess, addrs_of, make_array
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUCCESS = LLMStatusCode.LLM_SUCCESS
SHAPE = (2, 8, 64)
SEED = 5


def options(**settings: object) -> dict[str, str]:
    config = LLMConfig()
    config.enable_cache_manager = True
    for name, value in settings.items():
        setattr(config, name, value)
    return config.generate_options()


@pytest.fixture
def datadist() -> Iterator[LLMDataDist]:
    """Not initialised yet; finalized after the test."""
    datadist = LLMDataDist(LLMRole.DECODER, 2)
    yield datadist
    datadist.finalize()


def listen(peer: NodeProcess, listen_ip_info: str = "127.0.0.1:0", **settings: Any) -> int:
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info=listen_ip_info, **settings)
    peer.call(publish)
    return port


def publish(node: Node) -> int:
    return node.blocks_cache(*SHAPE, seed=SEED, key=BlocksCacheKey(0, 0)).cache_id


def pulls(node: Node, cluster_id: int = 1) -> bool:
    cache = node.blocks_cache(*SHAPE)
    blocks = list(range(SHAPE[1]))
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, blocks, blocks)
    return np.array_equal(node.arrays[cache.cache_id], make_array(SHAPE, SEED))


def linked_ids(node: Node) -> list[int]:
    return [link.cluster_id for link in node.datadist.links()]


def status_of(call: Callable[[], object]) -> LLMStatusCode:
    with pytest.raises(LLMException) as error:
        call()
    return error.value.status_code


# -- init ------------------------------------------------------------------------------------------


@pytest.mark.shows("datadist.init", "datadist.cache_manager")
def test_a_second_init_is_ignored(datadist: LLMDataDist) -> None:
    datadist.init(options(listen_ip_info="127.0.0.1:0"))
    manager, endpoint = datadist.cache_manager, datadist.listen_endpoint
    datadist.init({"llm.listenIpInfo": "nonsense"})
    assert datadist.cache_manager is manager
    assert datadist.listen_endpoint == endpoint


@pytest.mark.shows("datadist.init", "error.4")
def test_a_second_instance_must_wait_for_finalize(datadist: LLMDataDist) -> None:
    datadist.init(options())
    second = LLMDataDist(LLMRole.PROMPT, 3)
    with pytest.raises(LLMException, match="finalize it first") as error:
        second.init(options())
    assert error.value.status_code == LLMStatusCode.LLM_FAILED
    assert LLMDataDist.llm_engine_instance is datadist
    datadist.finalize()
    second.init(options())
    assert LLMDataDist.llm_engine_instance is second
    second.finalize()
    assert LLMDataDist.llm_engine_instance is None


@pytest.mark.shows("datadist.init", "error.8")
def test_a_port_in_use_is_named_and_init_may_be_tried_again(datadist: LLMDataDist) -> None:
    before = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LLMException, match=rf"127\.0\.0\.1:{port}.*another process") as error:
            datadist.init(options(listen_ip_info=f"127.0.0.1:{port}"))
    assert error.value.status_code == LLMStatusCode.LLM_FAILED
    assert LLMDataDist.llm_engine_instance is None
    assert (set(threading.enumerate()), set(os.listdir("/proc/self/fd"))) == before
    with pytest.raises(RuntimeError, match="not initialized"):
        datadist.links()
    datadist.init(options(listen_ip_info=f"127.0.0.1:{port}"))
    assert datadist.listen_endpoint == ("127.0.0.1", port)


@pytest.mark.shows("datadist.init", "error.8")
@pytest.mark.parametrize(
    "address", ["nonsense", "1.2.3:80", "localhost:80", "1.2.3.4", "[1.2.3.4]:80", "", ":80"]
)
def test_a_bad_address_is_refused_and_init_may_be_tried_again(
    datadist: LLMDataDist, address: str
) -> None:
    bad = {**options(), "llm.listenIpInfo": address}
    assert status_of(lambda: datadist.init(bad)) == LLMStatusCode.LLM_PARAM_INVALID
    assert LLMDataDist.llm_engine_instance is None
    datadist.init(options())
    assert datadist.links() == []


@pytest.mark.shows("error.8")
def test_an_address_that_this_machine_does_not_have_fails(datadist: LLMDataDist) -> None:
    elsewhere = options(listen_ip_info="192.0.2.1:0")
    assert status_of(lambda: datadist.init(elsewhere)) == LLMStatusCode.LLM_FAILED
    datadist.init(options())
    assert datadist.listen_endpoint is None


def test_before_init_nothing_but_finalize_works(datadist: LLMDataDist) -> None:
    datadist.finalize()
    for use in (
        lambda: datadist.link_clusters([]),
        lambda: datadist.unlink_clusters([]),
        lambda: datadist.cache_manager,
        lambda: datadist.links(),
        lambda: datadist.listen_endpoint,
    ):
        with pytest.raises(RuntimeError, match="llm datadist is not initialized") as error:
            use()
        assert not isinstance(error.value, LLMException)
    assert datadist.cluster_id == 2


@pytest.mark.shows("datadist.init")
def test_the_options_are_not_changed(datadist: LLMDataDist) -> None:
    given = options(listen_ip_info="127.0.0.1:0")
    copy = dict(given)
    datadist.init(given)
    assert given == copy


# -- finalize --------------------------------------------------------------------------------------


@pytest.mark.shows("datadist.finalize", "relies.6")
def test_finalize_and_init_on_the_same_port_start_anew(
    node: Node, peer: NodeProcess, path: str
) -> None:
    """As often as one likes, with the same options, while peers are linked."""
    port = listen(peer, transfer_path=path)
    listen_ip_info = f"127.0.0.1:{port}"
    node.start(LLMRole.DECODER, 2, transfer_path=path)
    for _ in range(5):
        assert node.link(port, 1) == SUCCESS
        assert pulls(node)
        peer.call(Node.stop)
        assert listen(peer, listen_ip_info, transfer_path=path) == port
        assert peer.call(publish) == 2, "ids count from 1 again"


@pytest.mark.shows("datadist.finalize", "datadist.cache_manager", "relies.6", "relies.8")
def test_one_object_may_be_finalized_and_initialised_again(datadist: LLMDataDist) -> None:
    managers = []
    memory = make_array((1, 4, 64), 1)
    desc = CacheDesc(1, [4, 64], DataType.DT_INT8)
    for _ in range(3):
        datadist.init(options(listen_ip_info="127.0.0.1:0"))
        managers.append(datadist.cache_manager)
        cache = datadist.cache_manager.register_cache(desc, addrs_of(memory))
        assert cache.cache_id == 1
        datadist.finalize()
        datadist.finalize()
    assert len(set(map(id, managers))) == 3


@pytest.mark.shows("datadist.finalize", "datadist.finalized")
def test_an_old_cache_manager_refuses(node: Node, peer: NodeProcess) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    assert node.link(port, 1) == SUCCESS
    old, blocks, rows = node.manager, node.blocks_cache(*SHAPE), node.rows_cache()
    host = node.blocks_cache(*SHAPE, placement=Placement.HOST)
    node.datadist.finalize()
    node.datadist.init(options())
    desc, row = blocks.cache_desc, CacheKeyByIdAndIndex(1, 1)
    target = TransferWithCacheKeyConfig(row, range(1), range(1))
    for call in (
        lambda: old.register_blocks_cache(desc, [4096, 8192]),
        lambda: old.register_cache(desc, [4096, 8192]),
        lambda: old.allocate_blocks_cache(desc),
        lambda: old.allocate_cache(desc),
        lambda: old.unregister_cache(1),
        lambda: old.pull_blocks(BlocksCacheKey(1, 0), blocks, [0], [0]),
        lambda: old.pull_cache(row, rows),
        lambda: old.push_blocks(BlocksCacheKey(1, 0), blocks, [0], [0]),
        lambda: old.push_cache(row, rows),
        lambda: old.transfer_cache_async(rows, Ready(), [target]),
        lambda: old.copy_cache(rows, rows, 0, 1),
        lambda: old.copy_blocks(blocks, {0: [1]}),
        lambda: old.swap_blocks(host, blocks, {0: 1}),
        lambda: old.deallocate_cache(rows),
        lambda: old.deallocate_blocks_cache(blocks),
        lambda: old.remove_cache_key(CacheKey(1, 1)),
        lambda: old.remap_registered_memory(MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 64)),
    ):
        with pytest.raises(LLMException, match="was finalized") as error:
            call()
        assert error.value.status_code == LLMStatusCode.LLM_ENGINE_FINALIZED


class Ready(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def test_a_new_engine_does_not_take_an_old_cache_for_its_own(node: Node, peer: NodeProcess) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    old = node.blocks_cache(*SHAPE)
    node.datadist.finalize()
    node.datadist.init(options())
    assert node.link(port, 1) == SUCCESS
    pull = lambda: node.manager.pull_blocks(BlocksCacheKey(1, 0), old, [0], [0])  # noqa: E731
    assert status_of(pull) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    assert not node.arrays[old.cache_id].any()


def test_peers_notice_finalize(node: Node, peer: NodeProcess, is_accessible: bool) -> None:
    port = listen(peer, enable_remote_cache_accessible=is_accessible)
    node.start(LLMRole.DECODER, 2, enable_remote_cache_accessible=is_accessible)
    assert node.link(port, 1) == SUCCESS
    assert pulls(node)
    peer.call(Node.stop)
    assert eventually(lambda: linked_ids(node) == [])
    with pytest.raises(LLMException, match="the last link ended because") as error:
        pulls(node)
    assert error.value.status_code == LLMStatusCode.LLM_NOT_YET_LINK


def test_a_listener_notices_that_its_caller_was_finalized(node: Node, peer: NodeProcess) -> None:
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    peer.call(Node.start, LLMRole.DECODER, 2)
    assert peer.call(Node.link, port, 1) == SUCCESS
    assert linked_ids(node) == [2]
    peer.call(Node.stop)
    assert eventually(lambda: linked_ids(node) == [])


def test_finalize_does_not_wait_for_a_peer_that_stands_still(
    node: Node, victim: NodeProcess, path: str
) -> None:
    port = listen(victim, transfer_path=path)
    node.start(LLMRole.DECODER, 2, transfer_path=path, sync_kv_timeout=30000)
    assert node.link(port, 1) == SUCCESS
    assert pulls(node)
    victim.pause()
    with takes_at_most(1.0):
        node.stop()


@pytest.mark.shows("datadist.finalize")
def test_finalize_waits_for_a_running_pull(node: Node, peer: NodeProcess) -> None:
    port = listen(peer, transfer_path="tcp")
    shape = (4, 64, 1 << 20)
    peer.call(large_source, shape)
    node.start(LLMRole.DECODER, 2, transfer_path="tcp", sync_kv_timeout=20_000)
    cache = node.blocks_cache(*shape)
    array, blocks = node.arrays[cache.cache_id], list(range(shape[1]))
    with FaultProxy(port) as proxy, ThreadPoolExecutor(1) as pool:
        assert node.link(proxy.port, 1) == SUCCESS
        proxy.slow(array.nbytes)
        pull = pool.submit(node.manager.pull_blocks, BlocksCacheKey(1, 1), cache, blocks, blocks)
        assert eventually(lambda: bool(array[0, 0, 0] == 7))
        assert array[-1, -1, -1] == 0, "the pull must be in its middle"
        node.datadist.finalize()
        assert (array == 7).all()
        pull.result(20)


def test_finalize_ends_a_link_call_of_another_thread(node: Node) -> None:
    """It must be exclusive, but must not leave a thread waiting for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        node.start(LLMRole.DECODER, 2)
        with ThreadPoolExecutor(1) as pool:
            linking = pool.submit(node.link, port, 1, 60_000)
            connection, _ = silent.accept()
            with connection, takes_at_most(2.0):
                node.datadist.finalize()
                with pytest.raises(LLMException, match="finalized meanwhile") as error:
                    linking.result(5)
    assert error.value.status_code == LLMStatusCode.LLM_FAILED


# -- what is left ----------------------------------------------------------------------------------


@pytest.mark.parametrize("listens", [False, True])
def test_cycles_leave_no_thread_and_no_descriptor(
    node: Node, peer: NodeProcess, path: str, listens: bool, is_accessible: bool
) -> None:
    settings: dict[str, Any] = {
        "transfer_path": path,
        "enable_remote_cache_accessible": is_accessible,
    }
    port = listen(peer, **settings)
    mine = {"listen_ip_info": "127.0.0.1:0"} if listens else {}

    def cycle() -> None:
        node.start(LLMRole.DECODER, 2, **settings, **mine)
        publish(node)
        assert node.link(port, 1) == SUCCESS
        assert pulls(node)
        assert peer.call(pulls, 2)
        node.stop()

    cycle()
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    assert eventually(lambda: peer.call(linked_ids) == [])
    theirs = peer.call(descriptors)
    for _ in range(20):
        cycle()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    assert eventually(lambda: peer.call(descriptors) <= theirs)


def descriptors(_: Node) -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_complained_about_at_the_end(
    node: Node, peer: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """No task that was destroyed while pending, no exception that nobody retrieved."""
    port = listen(peer)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            node.start(LLMRole.DECODER, 2, listen_ip_info="127.0.0.1:0")
            assert node.link(port, 1) == SUCCESS
            assert pulls(node)
            node.stop()
    assert [record.getMessage() for record in caplog.records] == []


# -- programs --------------------------------------------------------------------------------------


def run(program: str, *args: object, within_s: float) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end. Raises subprocess.TimeoutExpired when that takes too long."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )


def test_importing_starts_no_thread_and_changes_no_environment() -> None:
    program = """
import os, sys, threading
before = dict(os.environ), list(sys.path), threading.active_count()
import llm_datadist
assert (dict(os.environ), list(sys.path), threading.active_count()) == before
assert not {"asyncio", "torch", "multiprocessing"} & set(sys.modules), sys.modules.keys()
"""
    done = run(program, within_s=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


EXITING = """
import sys
from llm_datadist import BlocksCacheKey, LLMRole
from llm_datadist.testing.cluster import Node
node = Node()
node.start(LLMRole.DECODER, 2, listen_ip_info="127.0.0.1:0", transfer_path=sys.argv[2])
if int(sys.argv[1]):
    assert node.link(int(sys.argv[1]), 1) == 0
    cache = node.blocks_cache(2, 8, 64)
    node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0, 1], [0, 1])
print("end of program")
"""


@pytest.mark.shows("datadist.finalize")
@pytest.mark.parametrize("is_linked", [False, True])
def test_a_program_that_forgets_finalize_ends_promptly(
    peer: NodeProcess, is_linked: bool, path: str
) -> None:
    port = listen(peer, transfer_path=path)
    done = run(EXITING, port if is_linked else 0, path, within_s=15)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end of program\n", "")
    assert eventually(lambda: peer.call(linked_ids) == [])


def test_a_program_that_fails_while_linked_ends_promptly(peer: NodeProcess) -> None:
    port = listen(peer)
    done = run(EXITING + "raise SystemExit(3)", port, "cma", within_s=15)
    assert (done.returncode, done.stderr) == (3, "")


def test_a_program_ends_although_a_peer_takes_no_more_of_an_answer(victim: NodeProcess) -> None:
    """The peer stands still in the middle of what it pulls; the program must not wait for it."""
    program = """
import sys
from llm_datadist import BlocksCacheKey, LLMRole
from llm_datadist.testing.cluster import Node
node = Node()
port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", transfer_path="tcp")
cache = node.blocks_cache(4, 64, 1 << 20, key=BlocksCacheKey(0, 0))
node.arrays[cache.cache_id][:] = 7
print(port, flush=True)
sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        try:
            port = int(owner.stdout.readline())
            victim.call(
                Node.start, LLMRole.DECODER, 2, transfer_path="tcp", sync_kv_timeout=600_000
            )
            assert victim.call(Node.link, port, 1) == SUCCESS
            address = victim.call(large_destination)
            victim.begin(pull_all)
            assert eventually(lambda: peek(victim.pid, address) == 7)
            victim.pause()
            begun = time.monotonic()
            owner.stdin.close()
            assert owner.wait(10) == 0
            assert time.monotonic() - begun <= 5
        finally:
            owner.kill()


def large_destination(node: Node) -> int:
    """The address of the first byte of an empty cache."""
    return addrs_of(node.arrays[node.blocks_cache(4, 64, 1 << 20).cache_id])[0]


def pull_all(node: Node) -> None:
    blocks = list(range(64))
    node.manager.pull_blocks(BlocksCacheKey(1, 0), node.caches[1], blocks, blocks)


def peek(pid: int, address: int) -> int:
    """One byte of another process."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(1)[0]


def test_other_threads_work_on_when_the_main_thread_has_returned(
    peer: NodeProcess, path: str
) -> None:
    """A program whose main thread only starts others: links, large pulls and answers go on."""
    port = listen(peer, transfer_path=path)
    peer.call(large_source)
    program = """
import sys, threading
from llm_datadist import BlocksCacheKey, LLMRole
from llm_datadist.testing.cluster import Node

def work():
    threading.main_thread().join()
    assert node.link(int(sys.argv[1]), 1) == 0
    cache = node.blocks_cache(4, 64, 1 << 14)
    blocks = list(range(64))
    node.manager.pull_blocks(BlocksCacheKey(1, 1), cache, blocks, blocks)
    assert (node.arrays[cache.cache_id] == 7).all()
    print("worked")

node = Node()
node.start(LLMRole.DECODER, 2, listen_ip_info="127.0.0.1:0", transfer_path=sys.argv[2])
threading.Thread(target=work).start()
"""
    done = run(program, port, path, within_s=15)
    assert (done.returncode, done.stdout, done.stderr) == (0, "worked\n", "")


def large_source(node: Node, shape: tuple[int, int, int] = (4, 64, 1 << 14)) -> None:
    cache = node.blocks_cache(*shape, key=BlocksCacheKey(0, 1))
    node.arrays[cache.cache_id][:] = 7
