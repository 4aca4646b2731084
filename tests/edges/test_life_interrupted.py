"""init, finalize and the making of caches, struck by a signal's exception."""

from __future__ import annotations

import gc
import random
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

import effort
from edges.interrupting import interrupts, is_interrupted
from edges.scarce import become_nobody, lift_limit, limit_threads
from edges.test_life import listening_ports
from edges.user import EVERY, KEY, SUCCESS, User, settings, start_owner, status_of
from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually, takes_at_most
from soak.stage import Doing
from soak.tally import descriptors, threads

if TYPE_CHECKING:
    from llm_datadist import Cache
    from llm_datadist.testing.cluster import Node, NodeProcess

DESC = CacheDesc(1, [4, 4096], DataType.DT_INT8)
POOL = '{"memory_size": 67108864}'


def start_slow_pull(node: Node, port: int) -> None:
    User(node, "tcp", port, 60_000)


def pull(node: Node) -> LLMStatusCode:
    return status_of(lambda: node.manager.pull_blocks(KEY, node.caches[1], EVERY, EVERY))


def start_poor_owner(node: Node) -> int:
    become_nobody(23481)
    return start_owner(node, "tcp", 3000)


def finalize_until_ctrl_c(node: Node, *, has_threads: bool) -> str:
    """While an answer runs."""
    if not has_threads:
        limit_threads()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        node.datadist.finalize()
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        lift_limit()
    return "it ended"


def finalize_again(node: Node) -> tuple[list[int], list[str]]:
    node.datadist.finalize()
    eventually(lambda: not left_of_us(), 2.0)
    return listening_ports(node), left_of_us()


def init_again(node: Node) -> tuple[int, bool]:
    """How many ports are open then, and whether the cluster can be used."""
    node.datadist.init(
        {
            "llm.EnableCacheManager": "1",
            "llm.listenIpInfo": "127.0.0.1:0",
        }
    )
    node.blocks_cache()
    return len(listening_ports(node)), node.datadist.listen_endpoint is not None


def left_of_us() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "llm-datadist" in thread.name]


@pytest.mark.parametrize("has_threads", [True, False])
def test_a_finalize_that_was_interrupted_is_gone_on_with(
    node: Node, victim: NodeProcess, has_threads: bool
) -> None:
    with FaultProxy(victim.call(start_poor_owner)) as proxy:
        start_slow_pull(node, proxy.port)
        proxy.slow(1 << 20)
        before = proxy.nbytes_passed(to_caller=True)
        pulling = Doing(lambda: pull(node))
        while proxy.nbytes_passed(to_caller=True) < before + (1 << 16):
            pass  # the answer runs, not only the look-up's
        said = victim.call(finalize_until_ctrl_c, has_threads=has_threads)
        assert said == "interrupted"
        if has_threads:
            assert victim.call(init_again) == (1, True)
        assert victim.call(finalize_again) == ([], [])
    assert pulling.result() != SUCCESS


def strike_init(node: Node, count: int) -> list[str]:
    """What is left of clusters whose init was struck once, and that were finalized then."""
    node.start(LLMRole.MIX, 1, **settings("tcp"))
    node.stop()
    before, draw = (descriptors(), threads()), random.Random(1)
    options = {"llm.EnableCacheManager": "1", "llm.listenIpInfo": "127.0.0.1:0"}
    with interrupts():
        for number in range(count):
            datadist = LLMDataDist(LLMRole.MIX, 1)

            def live(datadist: LLMDataDist = datadist) -> None:
                datadist.init(options)
                datadist.finalize()

            with suppress(KeyError):  # of `Thread.start`: not the handler's
                is_interrupted(live, draw.uniform(2e-5, 8e-3))
            datadist.finalize()
            gc.collect()
            if not eventually(lambda: descriptors() <= before[0] + 1 and threads() <= before[1]):
                return [f"{number}: {before}, {(descriptors(), threads())}: {left_of_us()}"]
    return []


def test_an_init_that_was_interrupted_leaves_nothing(victim: NodeProcess) -> None:
    assert victim.call(strike_init, effort.rounds(300)) == []


def strike_caches(node: Node, count: int) -> dict[str, tuple[int, int]]:
    """By call, how many were interrupted, and how many caches there are that nobody has."""
    node.start(LLMRole.MIX, 1, mem_pool_cfg=POOL, **settings("tcp"))
    manager, tensor, draw = node.manager, np.zeros((4, 4096), np.int8), random.Random(1)
    got: list[Cache] = []

    # called as they are: behind a call by way of C code a strike would lose what it returned
    def register() -> None:
        if not got:
            got.append(manager.register_blocks_cache(DESC, [tensor], BlocksCacheKey(2)))

    def allocate() -> None:
        if not got:
            got.append(manager.allocate_blocks_cache(DESC))

    found = {}
    for work in (register, allocate):
        interrupted = 0
        with interrupts():
            for _ in range(count):
                interrupted += is_interrupted(work, draw.uniform(2e-5, 4e-4))
                while got:
                    cache = got.pop()
                    manager.unregister_cache(cache.cache_id)
                    manager.deallocate_blocks_cache(cache)
        eventually(lambda: node.datadist.stats().num_caches == 0, 1.0)
        found[work.__name__] = (interrupted, node.datadist.stats().num_caches)
    return found


def test_a_cache_whose_making_was_interrupted_is_nobodys(victim: NodeProcess) -> None:
    found = victim.call(strike_caches, effort.rounds(1500))
    assert {name: left for name, (_, left) in found.items()} == {"register": 0, "allocate": 0}
    assert all(interrupted > effort.rounds(100) for interrupted, _ in found.values())


@pytest.mark.parametrize("end", ["unregister", "finalize"])
def test_whoever_waits_for_readers_of_a_cache_that_goes_is_told_at_once(
    node: Node, end: str
) -> None:
    node.start(LLMRole.MIX, 1, **settings("tcp"))
    manager, tensor = node.manager, np.zeros((4, 4096), np.int8)
    cache = manager.register_blocks_cache(DESC, [tensor], readers=2)
    waiting = Doing(lambda: manager.wait_for_readers(cache, 1000.0))
    assert not manager.wait_for_readers(cache, 0.2)
    with takes_at_most(3.0):
        if end == "unregister":
            manager.unregister_cache(cache.cache_id)
        else:
            node.datadist.finalize()
        with pytest.raises(LLMException) as caught:
            waiting.result(5.0)
    assert caught.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
