"""A signal's handler that calls the library strikes in the middle of what its thread does there.

It may strike under a lock of the library's: what it waits for must not need that lock.
"""

from __future__ import annotations

import json
import random
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

import effort
from edges.user import EVERY, KEY, SHAPE, SUCCESS, settings, status_of
from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import cluster_info

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.testing.cluster import Node, NodeProcess

ROUNDS = effort.rounds(60)
#: a strike comes at random within what the calls below take, so often each round
LONGEST_S = 2e-3
POOL = json.dumps({"memory_size": 4 << 20})
DESC = CacheDesc(1, [4, 512], DataType.DT_UINT8)
#: what a small pull takes that opens a connection first
OPENING_S = 5e-4
ELSEWHERE = 77
LARGE_KEY = BlocksCacheKey(1, 1)


def start(node: Node) -> int:
    return node.start(
        LLMRole.MIX, 1, mem_pool_cfg=POOL, listen_ip_info="127.0.0.1:0", **settings("tcp", 200)
    )


def strike_in(work: Callable[[], object], call: Callable[[], object], draw: random.Random) -> int:
    """Works until a handler has called; whether that was while it worked."""
    struck = []

    def handle(*_: object) -> None:
        struck.append(call())

    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-5, LONGEST_S))
    with suppress(LLMException):  # the cluster is gone
        while not struck:
            work()
    return len(struck)


class Allocating:
    """Takes and gives back, and looks at what it has."""

    def __init__(self, manager: CacheManager) -> None:
        self._manager = manager
        self._cache = manager.allocate_blocks_cache(DESC)

    def __call__(self) -> None:
        self._cache.numpy()
        self._manager.deallocate_cache(self._manager.allocate_cache(DESC))


def finalize_anywhere(node: Node) -> int:
    draw, struck = random.Random(1), 0
    for _ in range(ROUNDS):
        start(node)
        struck += strike_in(Allocating(node.manager), node.datadist.finalize, draw)
        node.stop()
    return struck


def unlink_anywhere(node: Node, port: int) -> set[LLMStatusCode]:
    """While a peer pulls from here: what the cluster's thread then needs, this thread holds."""
    draw, statuses = random.Random(2), set()
    cache = node.blocks_cache(1, 16, 512)

    def unlink() -> None:
        info = [cluster_info(port, ELSEWHERE)]
        statuses.add(node.datadist.unlink_clusters(info, 500, force=True)[0])

    for _ in range(4 * ROUNDS):
        strike_in(lambda: node.manager.copy_blocks(cache, {0: [1]}), unlink, draw)
    return statuses


def pull_for_ever(node: Node, port: int) -> None:
    node.start(LLMRole.DECODER, 2, **settings("tcp"))
    assert node.link(port, 1) == SUCCESS
    cache = node.blocks_cache(1, 16, 512)
    with suppress(LLMException):  # at the end of the one that it pulls from
        while True:
            node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0], [0])


class Opening:
    """A node whose pull opens a connection each time: a handler strikes in the middle of that."""

    def __init__(self, node: Node, path: str, port: int) -> None:
        node.start(LLMRole.DECODER, 2, **settings(path))
        self.node = node
        self._port = port
        self._small = node.blocks_cache(1, 16, 512)
        self._draw = random.Random(3)
        #: what the handler's calls returned
        self.statuses: set[LLMStatusCode] = set()

    def strike(self, call: Callable[[], LLMStatusCode], rounds: int) -> set[LLMStatusCode]:
        signal.signal(signal.SIGALRM, lambda *_: self.statuses.add(call()))
        for _ in range(rounds):
            self.node.unlink(self._port, 1, force=True)
            assert self.node.link(self._port, 1) == SUCCESS
            signal.setitimer(signal.ITIMER_REAL, self._draw.uniform(1e-6, OPENING_S))
            status_of(lambda: self.node.manager.pull_blocks(KEY, self._small, [0], [0]))
            signal.setitimer(signal.ITIMER_REAL, 0)
        return self.statuses


def link_anywhere(node: Node, port: int, other_port: int) -> set[LLMStatusCode]:
    info = [cluster_info(other_port, ELSEWHERE)]

    def link() -> LLMStatusCode:
        node.datadist.unlink_clusters(info, 3000, force=True)
        return node.datadist.link_clusters(info, 3000)[0]

    return Opening(node, "auto", port).strike(link, 4 * ROUNDS)


def pull_anywhere(node: Node, port: int) -> set[LLMStatusCode]:
    """So much that helpers are asked for, who open connections, too."""
    opening = Opening(node, "tcp", port)
    large = node.blocks_cache(*SHAPE)

    def pull() -> LLMStatusCode:
        return status_of(lambda: node.manager.pull_blocks(LARGE_KEY, large, EVERY, EVERY))

    return opening.strike(pull, 4 * ROUNDS)


def publish_all(node: Node, cluster_id: int) -> int:
    port = node.start(
        LLMRole.MIX, cluster_id, listen_ip_info="127.0.0.1:0", **settings("auto", 5000)
    )
    node.blocks_cache(1, 16, 512, key=BlocksCacheKey(0, 0))
    node.blocks_cache(*SHAPE, key=BlocksCacheKey(0, 1))
    return port


def publish(node: Node) -> int:
    port = start(node)
    node.blocks_cache(1, 16, 512, key=BlocksCacheKey(0, 0))
    return port


def stop(node: Node) -> None:
    node.stop()


def test_a_handler_that_finalizes_returns_wherever_it_strikes(victim: NodeProcess) -> None:
    assert victim.call(finalize_anywhere) == ROUNDS


def test_a_handler_that_unlinks_returns_wherever_it_strikes(
    victim: NodeProcess, peer: NodeProcess
) -> None:
    port = victim.call(publish)
    peer.begin(pull_for_ever, port)
    statuses = victim.call(unlink_anywhere, port)
    assert SUCCESS in statuses
    assert statuses <= {SUCCESS, LLMStatusCode.LLM_FAILED}  # where it cannot wait, it says so
    victim.call(stop)
    peer.result()


def test_a_handler_that_links_returns_wherever_it_strikes(
    victim: NodeProcess, peer: NodeProcess, node: Node
) -> None:
    ports = peer.call(publish_all, 1), publish_all(node, ELSEWHERE)
    statuses = victim.call(link_anywhere, *ports)
    assert SUCCESS in statuses
    assert statuses <= {SUCCESS, LLMStatusCode.LLM_FAILED}  # where it cannot wait, it says so


def test_a_handler_that_pulls_returns_wherever_it_strikes(
    victim: NodeProcess, peer: NodeProcess
) -> None:
    statuses = victim.call(pull_anywhere, peer.call(publish_all, 1))
    assert statuses == {SUCCESS}
