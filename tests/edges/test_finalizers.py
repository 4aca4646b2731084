"""Objects whose __del__ calls the library, in cycles: the garbage collector strikes anywhere."""

from __future__ import annotations

import gc
import itertools
import json
import signal
import threading
import time
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import pytest

import effort
from edges.user import KEY, OWNED, SHAPE, SMALL, SUCCESS, User, settings, start_owner, status_of
from llm_datadist import (
    CacheDesc,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.cpp import (
    OPTION_DEVICE_ID,
    OPTION_ENABLE_SET_ROLE,
    OPTION_LISTEN_IP_INFO,
    LlmDataDist,
    LlmRole,
)
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually, takes_at_most
from soak.stage import Doing

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.testing.cluster import Bytes, Node, NodeProcess

#: room for all that the test makes, should nobody collect it in time
POOL = json.dumps({"memory_size": 32 << 20, "page_shift": 12})
DESC = CacheDesc(1, [4, 512], DataType.DT_UINT8)


class Registered:
    """A buffer that is registered as long as somebody knows it."""

    def __init__(self, manager: CacheManager) -> None:
        self._manager = manager
        self._memory = np.zeros(4 * 512, np.uint8)
        self._cache = manager.register_blocks_cache(DESC, [self._memory])
        self._me = self  # only the garbage collector ends it

    def __del__(self) -> None:
        self._manager.unregister_cache(self._cache.cache_id)


class Allocated:
    """A cache in pool memory, as long as somebody knows it."""

    def __init__(self, manager: CacheManager) -> None:
        self._manager = manager
        self._cache = manager.allocate_blocks_cache(DESC)
        self._me = self

    def __del__(self) -> None:
        self._manager.deallocate_blocks_cache(self._cache)


def work(node: Node, path: str, port: int, threshold: int, rounds: int) -> list[str]:
    """Threads make such objects and pull meanwhile; what was wrong, or is left of it."""
    gc.set_threshold(threshold)
    node.start(LLMRole.DECODER, 2, mem_pool_cfg=POOL, **settings(path))
    assert node.link(port, 1) == SUCCESS
    manager, blocks, wrong = node.manager, list(range(SMALL[1])), []
    before = node.datadist.stats().num_caches

    def make(kind: Callable[[CacheManager], object]) -> None:
        for _ in range(rounds):
            kind(manager)

    def pull() -> None:
        cache = node.blocks_cache(*SMALL)
        for _ in range(rounds):
            manager.pull_blocks(KEY, cache, blocks, blocks)
        if not (node.arrays[cache.cache_id] == OWNED).all():
            wrong.append("a pull has other bytes")
        manager.unregister_cache(cache.cache_id)

    def look() -> None:
        for _ in range(rounds):
            node.datadist.stats(), node.datadist.links(), node.datadist.pools()

    jobs = [lambda: make(Registered), lambda: make(Allocated), pull, look]
    for thread in [Doing(job) for job in jobs for _ in range(2)]:
        thread.result(60)
    gc.set_threshold(700)
    gc.collect()
    manager.deallocate_blocks_cache(manager.allocate_blocks_cache(DESC))  # looks at the pools
    ((usage,),) = node.datadist.pools().values()
    if usage.free_nbytes != usage.capacity_nbytes:
        wrong.append(f"the pool did not come back: {usage}")
    if node.datadist.stats().num_caches != before:
        wrong.append(f"{node.datadist.stats().num_caches} caches are left of {before}")
    return wrong


@pytest.mark.parametrize(("threshold", "rounds"), [(1, 30), (20, 500), (700, 2000)])
def test_finalizers_that_unregister_and_deallocate_strike_anywhere(
    peer: NodeProcess, victim: NodeProcess, path: str, threshold: int, rounds: int
) -> None:
    port = peer.call(start_owner, path, shape=SMALL)
    victim.begin(work, path, port, threshold, effort.rounds(rounds))
    assert victim.result(60) == []


class Cluster:
    """A cluster that is finalized when nobody knows it any more, in whichever thread that is."""

    def __init__(self, ended: threading.Event) -> None:
        self.datadist, self._ended, self._me = LLMDataDist(LLMRole.MIX, 2), ended, self

    def __del__(self) -> None:
        self.datadist.finalize()
        self._ended.set()


def drop_clusters(node: Node, path: str, port: int, rounds: int) -> list[str]:
    """Each is dropped while its threads work, and collected in one of them or in ours."""
    wrong = []
    for _ in range(rounds):
        ended = threading.Event()
        cluster = Cluster(ended)
        node._datadist = cluster.datadist
        cluster.datadist.init(node_options(path))
        assert node.link(port, 1) == SUCCESS
        cache, blocks = node.blocks_cache(*SMALL), list(range(SMALL[1]))
        manager = node.manager
        node._datadist = None
        gc.set_threshold(10)
        del cluster
        try:
            for _ in range(100):
                manager.pull_blocks(KEY, cache, blocks, blocks)
        except LLMException:
            pass
        gc.set_threshold(700)
        with takes_at_most(10):
            gc.collect()
            if not ended.wait(10):
                wrong.append("finalize in a finalizer hangs")
        if not eventually(lambda: LLMDataDist.llm_engine_instance is None, 10):
            wrong.append("the cluster is still there")
    return wrong


def node_options(path: str) -> dict[str, str]:
    config = LLMConfig()
    config.enable_cache_manager = True
    for name, value in settings(path, 300).items():
        setattr(config, name, value)
    return config.generate_options()


def test_a_cluster_that_the_garbage_collector_ends(
    peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    victim.begin(drop_clusters, path, peer.call(start_owner, path, shape=SMALL), 3)
    assert victim.result(60) == []


def link_to(node: Node, port: int) -> None:
    node.start(LLMRole.DECODER, 2, **settings("tcp", 3000))
    assert node.link(port, 1) == SUCCESS


def finalize_inside_a_pull(node: Node) -> tuple[float, LLMStatusCode]:
    """A handler does, while its thread waits; how long that took, and how the pull ended."""
    cache, blocks, took = node.blocks_cache(*SMALL), list(range(SMALL[1])), []

    def handle(*_: object) -> None:
        begun = time.monotonic()
        node.datadist.finalize()
        took.append(time.monotonic() - begun)

    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(LLMException) as raised:
        node.manager.pull_blocks(KEY, cache, blocks, blocks)
    return took[0], raised.value.status_code


def test_a_finalize_inside_a_call_of_its_own_thread_does_not_wait_for_that(
    peer: NodeProcess, victim: NodeProcess
) -> None:
    port = peer.call(start_owner, "tcp", shape=SMALL)
    victim.call(link_to, port)
    peer.pause()
    try:
        took_s, status = victim.call(finalize_inside_a_pull)
    finally:
        peer.resume()
    assert took_s < 1
    assert status in (LLMStatusCode.LLM_TIMEOUT, LLMStatusCode.LLM_NOT_YET_LINK)
    victim.call(link_to, port)


class Noted(Registered):
    """Says where and how it was unregistered."""

    def __init__(self, manager: CacheManager, memory: Bytes) -> None:
        desc = CacheDesc(SHAPE[0], list(SHAPE[1:]), DataType.DT_UINT8)
        self._manager, self._memory, self._me = manager, memory, self
        self._cache = manager.register_blocks_cache(desc, memory, KEY)

    def __del__(self) -> None:
        begun, how = time.monotonic(), "ok"
        try:
            super().__del__()
        except LLMException as error:
            how = str(error)
        noted.put((threading.current_thread().name, how, time.monotonic() - begun))


noted = SimpleQueue[tuple[str, str, float]]()


def hold_buffer(node: Node) -> int:
    """Cluster 1, with a cache that the collector will end; the port."""
    gc.disable()
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings("tcp", 3000))
    node.buffer = Noted(node.manager, np.ones(SHAPE, np.uint8))  # type: ignore[attr-defined]
    return port


def let_go_of_buffer(node: Node) -> tuple[str, str, float]:
    """Another thread collects it, while this one makes no objects."""
    del node.buffer  # type: ignore[attr-defined]
    enable, wait = gc.enable, noted.get
    gc.set_threshold(1, 1, 1)
    enable()
    return wait(True, 10)


def test_a_finalizer_in_the_clusters_threads_does_not_wait_for_them(
    node: Node, victim: NodeProcess
) -> None:
    """A slow peer is being sent the very cache: by those threads, by turns."""
    with FaultProxy(victim.call(hold_buffer)) as proxy:
        user = User(node, "tcp", proxy.port, 20_000)
        before = proxy.nbytes_passed(to_caller=True)
        proxy.slow(1 << 18)
        pull = Doing(partial(status_of, user.pull))
        while proxy.nbytes_passed(to_caller=True) < before + (1 << 17):
            pass
        thread, how, took_s = victim.call(let_go_of_buffer)
        assert (thread.startswith("llm-datadist"), how) == (True, "ok")
        assert took_s < 1
        proxy.restore()
        assert pull.result(20) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


class Ended:
    """Has a cluster of C++ shape finalized by the garbage collector."""

    def __init__(self, cluster: LlmDataDist) -> None:
        self._cluster, self._me = cluster, self

    def __del__(self) -> None:
        self._cluster.Finalize()


class Collecting:
    """The collector strikes in the loop's thread, at the call of that number."""

    def __init__(self, at: int) -> None:
        self._at = at
        self._counter = itertools.count()
        self.is_armed = False
        threading.setprofile(self._strike)

    def _strike(self, _frame: object, event: str, _arg: object) -> None:
        if (
            event == "call"
            and self.is_armed
            and "loop" in threading.current_thread().name
            and next(self._counter) == self._at
        ):
            gc.collect()


def finalize_in_the_loop(node: Node, verb: str) -> list[str]:
    gc.disable()
    wrong, listen = [], {OPTION_DEVICE_ID: "0", OPTION_LISTEN_IP_INFO: "127.0.0.1:0"}
    for at in range(0, 40, 3):
        collecting = Collecting(at)
        cluster = LlmDataDist(1, LlmRole.kPrompt)
        Ended(cluster)
        begun = time.monotonic()
        collecting.is_armed = verb == "Initialize"
        cluster.Initialize({**listen, OPTION_ENABLE_SET_ROLE: "1"})
        collecting.is_armed = True
        cluster.SetRole(LlmRole.kDecoder, {OPTION_LISTEN_IP_INFO: "127.0.0.2:0"})
        threading.setprofile(None)
        cluster.Finalize()
        if time.monotonic() - begun > 5:
            wrong.append(f"{verb} took {time.monotonic() - begun:.1f} s at call {at} of the loop")
        gc.collect()
    return wrong


@pytest.mark.parametrize("verb", ["Initialize", "SetRole"])
def test_a_finalizer_in_the_loop_while_it_is_waited_for(victim: NodeProcess, verb: str) -> None:
    assert victim.call(finalize_in_the_loop, verb) == []
