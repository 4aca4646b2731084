"""Many threads on one link: every byte right, no deadlock, and nobody stands in another's way."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llm_datadist import Cache

SUCCESS = LLMStatusCode.LLM_SUCCESS
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST

THREADS = 32
#: no test takes this long unless something is stuck
STUCK_S = 40.0
SMALL = (2, 32, 64)
#: large enough to be moved in parts by several threads and streams
LARGE = (4, 8, 1 << 17)


@pytest.fixture(scope="module")
def other_process() -> Iterator[NodeProcess]:
    """A second process, to be linked and unlinked meanwhile."""
    with NodeProcess() as process:
        yield process


@pytest.fixture
def other(other_process: NodeProcess) -> Iterator[NodeProcess]:
    yield other_process
    other_process.call(Node.stop)


@pytest.fixture
def port(node: Node, peer: NodeProcess, is_accessible: bool, path: str) -> int:
    """A node here, linked to one in another process; both have caches to pull."""
    settings = settings_of(is_accessible, path)
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    peer.call(publish)
    publish(node)
    assert node.link(port, 1) == SUCCESS
    return port


def settings_of(is_accessible: bool, path: str) -> dict[str, Any]:
    return {
        "enable_remote_cache_accessible": is_accessible,
        "transfer_path": path,
        "sync_kv_timeout": 20_000,
    }


def publish(node: Node) -> None:
    """Cache 1 is small, cache 2 is large."""
    node.blocks_cache(*SMALL, seed=1, key=BlocksCacheKey(0, 1))
    node.blocks_cache(*LARGE, seed=2, key=BlocksCacheKey(0, 2))


@cache
def expected_array(model_id: int) -> Bytes:
    """What cache `model_id` of every peer holds."""
    return make_array(SMALL if model_id == 1 else LARGE, model_id)


def pull_often(node: Node, cluster_id: int, thread: int, rounds: int) -> int:
    """One thread's work: random blocks of both caches of a peer; how many pulls were right."""
    rng = np.random.default_rng(thread)
    sources = {1: expected_array(1), 2: expected_array(2)}
    right = 0
    for round_ in range(rounds):
        model_id = 2 if round_ % 4 == thread % 4 else 1
        source = sources[model_id]
        mine = node.blocks_cache(*source.shape)
        count = int(rng.integers(1, source.shape[1] + 1))
        src, dst = (rng.permutation(source.shape[1])[:count].tolist() for _ in range(2))
        key = BlocksCacheKey(cluster_id, model_id)
        expected = np.zeros_like(source)
        expected[:, dst] = source[:, src]
        node.manager.pull_blocks(key, mine, src, dst)
        right += bool(np.array_equal(node.arrays[mine.cache_id], expected))
        forget(node, mine.cache_id)
    return right


def forget(node: Node, cache_id: int) -> None:
    node.manager.unregister_cache(cache_id)
    del node.arrays[cache_id], node.caches[cache_id]


def pull_from_threads(node: Node, cluster_id: int, threads: int, rounds: int) -> int:
    with ThreadPoolExecutor(threads) as pool:
        calls = [
            pool.submit(pull_often, node, cluster_id, thread, rounds) for thread in range(threads)
        ]
        return sum(call.result(STUCK_S) for call in as_completed(calls, STUCK_S))


def link_count(node: Node) -> int:
    return len(node.datadist.links())


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Repeats `work` in a thread until the block has ended, at least once."""
    ended = threading.Event()

    def repeat() -> int:
        times = 0
        while not ended.is_set() or not times:
            work()
            times += 1
        return times

    with ThreadPoolExecutor(1) as pool:
        repeating: Future[int] = pool.submit(repeat)
        try:
            yield
        finally:
            ended.set()
        repeating.result(STUCK_S)


@pytest.mark.shows("relies.15", "D11")
@pytest.mark.usefixtures("port")
def test_many_threads_pull_on_one_link(node: Node) -> None:
    assert pull_from_threads(node, 1, THREADS, 4) == THREADS * 4


@pytest.mark.usefixtures("port")
def test_many_threads_of_a_listener_pull_from_its_caller(peer: NodeProcess) -> None:
    assert peer.call(pull_from_threads, 2, THREADS, 4) == THREADS * 4


@pytest.mark.usefixtures("port")
def test_both_ends_pull_from_each_other_at_once(node: Node, peer: NodeProcess) -> None:
    peer.begin(pull_from_threads, 2, 16, 6)
    assert pull_from_threads(node, 1, 16, 6) == 96
    assert peer.result(STUCK_S) == 96


@pytest.mark.shows("O27", "unlink.waits", "relies.15")
@pytest.mark.usefixtures("port")
def test_pulls_go_on_while_another_peer_is_linked_and_unlinked(
    node: Node, other: NodeProcess, is_accessible: bool, path: str
) -> None:
    settings = settings_of(is_accessible, path)
    port = other.call(Node.start, LLMRole.PROMPT, 3, listen_ip_info="127.0.0.1:0", **settings)
    other.call(publish)

    def relink() -> None:
        assert node.link(port, 3) == SUCCESS
        assert pull_often(node, 3, 0, 1) == 1
        assert node.unlink(port, 3) == SUCCESS

    with meanwhile(relink):
        assert pull_from_threads(node, 1, 16, 6) == 96


@pytest.mark.usefixtures("port")
def test_pulls_go_on_while_both_ends_register_and_unregister(node: Node, peer: NodeProcess) -> None:
    peer.begin(register_and_unregister, 100)
    with meanwhile(lambda: register_and_unregister(node, 5)):
        assert pull_from_threads(node, 1, 16, 6) == 96
    peer.result(STUCK_S)


def register_and_unregister(node: Node, times: int) -> None:
    for time_ in range(times):
        forget(node, node.blocks_cache(key=BlocksCacheKey(0, 100 + time_ % 7)).cache_id)


@pytest.mark.shows("unlink.waits", "D11")
@pytest.mark.parametrize("force", [False, True])
def test_relinking_the_link_that_threads_pull_on(node: Node, port: int, force: bool) -> None:
    """Each pull moves all its bytes, or says that there is no link."""
    ended = threading.Event()

    def pull_until_ended(thread: int) -> dict[LLMStatusCode, int]:
        counts = {SUCCESS: 0}
        while not ended.is_set():
            try:
                assert pull_often(node, 1, thread, 1) == 1
                status = SUCCESS
            except LLMException as error:
                status = error.status_code
            counts[status] = counts.get(status, 0) + 1
        return counts

    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(pull_until_ended, thread) for thread in range(6)]
        try:
            for _ in range(4):
                assert node.unlink(port, 1, 10_000, force=force) == SUCCESS
                assert node.link(port, 1, 10_000) == SUCCESS
                assert pull_often(node, 1, 6, 1) == 1
        finally:
            ended.set()
        statuses = {status for call in calls for status in call.result(STUCK_S)}
    assert statuses <= {SUCCESS, NOT_YET_LINK}


@pytest.mark.parametrize("is_listener", [False, True])
def test_threads_that_fail_do_not_hold_up_others(
    node: Node, peer: NodeProcess, is_listener: bool
) -> None:
    """A pull into memory that is not there ends its stream; the others get new ones."""
    settings = settings_of(False, "tcp")
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    peer.call(publish)
    publish(node)
    assert node.link(port, 1) == SUCCESS
    begun = time.monotonic()
    if is_listener:
        assert peer.call(pull_and_fail, 2) == ([10] * 16, {PARAM_INVALID})
    else:
        assert pull_and_fail(node, 1) == ([10] * 16, {PARAM_INVALID})
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("threads", "count"), [(4, 60), pytest.param(32, 30, marks=pytest.mark.long)]
)
def test_no_thread_waits_in_vain_for_a_stream_that_another_one_took(
    node: Node, peer: NodeProcess, threads: int, count: int
) -> None:
    """The end that was called has to ask for its streams, and each of these pulls costs one."""
    settings = settings_of(False, "tcp")
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    publish(node)
    assert node.link(port, 1) == SUCCESS
    assert peer.call(fail_often, 2, threads, count) == {PARAM_INVALID}


def fail_often(node: Node, cluster_id: int, threads: int, count: int) -> set[LLMStatusCode]:
    nowhere = register_nowhere(node)
    with ThreadPoolExecutor(threads) as pool:
        calls = [pool.submit(fail, node, cluster_id, nowhere, count) for _ in range(threads)]
        return set().union(*(call.result(STUCK_S) for call in calls))


def pull_and_fail(node: Node, cluster_id: int) -> tuple[list[int], set[LLMStatusCode]]:
    """What 16 threads that pull achieve, and what 16 others get that cannot."""
    nowhere = register_nowhere(node)
    with ThreadPoolExecutor(32) as pool:
        failing = [pool.submit(fail, node, cluster_id, nowhere, 10) for _ in range(16)]
        pulling = [pool.submit(pull_often, node, cluster_id, thread, 10) for thread in range(16)]
        failures = [call.result(STUCK_S) for call in failing]
        return [call.result(STUCK_S) for call in pulling], set().union(*failures)


def register_nowhere(node: Node) -> Cache:
    """A cache at addresses where there is no memory."""
    desc = CacheDesc(SMALL[0], [*SMALL[1:]], DataType.DT_INT8)
    return node.manager.register_blocks_cache(desc, [0x1000, 0x2000])


def fail(node: Node, cluster_id: int, nowhere: Cache, count: int) -> set[LLMStatusCode]:
    """What a thread gets whose pulls cannot arrive."""
    statuses = set()
    for _ in range(count):
        try:
            node.manager.pull_blocks(BlocksCacheKey(cluster_id, 1), nowhere, [0], [0])
        except LLMException as error:
            statuses.add(error.status_code)
    return statuses


@pytest.mark.usefixtures("port")
def test_memory_is_left_alone_once_it_is_unregistered(node: Node) -> None:
    """`unregister_cache` waits for the pulls into the memory, and later ones are refused."""
    for _ in range(10):
        mine = node.blocks_cache(*LARGE)
        array = node.arrays[mine.cache_id]
        with ThreadPoolExecutor(1) as pool:
            pulling = pool.submit(pull_until_refused, node, mine)
            while not array.any():  # the first pull has begun
                assert not pulling.done()
            node.manager.unregister_cache(mine.cache_id)
            array[:] = 0xEE
            assert pulling.result(STUCK_S) == NOT_EXIST
        assert (array == 0xEE).all()


def pull_until_refused(node: Node, mine: Cache) -> LLMStatusCode:
    blocks = list(range(LARGE[1]))
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            node.manager.pull_blocks(BlocksCacheKey(1, 2), mine, blocks, blocks)
        except LLMException as error:
            return error.status_code
    return SUCCESS


@pytest.mark.usefixtures("port")
def test_rows_are_pulled_by_id_while_blocks_are(node: Node, peer: NodeProcess) -> None:
    rows_id = peer.call(add_rows)
    expected = make_array((2, 4, 256), 9)

    def pull_rows() -> None:
        mine = node.rows_cache(2, 1, 256)
        for row in range(4):
            node.manager.pull_cache(CacheKeyByIdAndIndex(1, rows_id, row), mine)
            assert np.array_equal(node.arrays[mine.cache_id][:, 0], expected[:, row])

    with meanwhile(pull_rows):
        assert pull_from_threads(node, 1, 8, 10) == 80


def add_rows(node: Node) -> int:
    return node.rows_cache(2, 4, 256, seed=9).cache_id
