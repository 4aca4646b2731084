"""Crowds at the port that say nothing: links that exist, and new ones, do as if they were alone."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from wire import Wire, hello

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.timing import eventually, takes_at_most
from llm_datadist.transport.same_host import SameHost

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.core.stats import ClusterStats

SUCCESS = LLMStatusCode.LLM_SUCCESS
#: large enough for several streams
SHAPE = (4, 16, 1 << 17)
SOON_S = 3.0
#: docs/security.md
MOST_OF_ONE_ADDRESS = 256
CROWD = 540


def settings(path: str) -> dict[str, Any]:
    return {"transfer_path": path, "transfer_threads": 4, "sync_kv_timeout": 5000}


def own(node: Node) -> None:
    node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(0, 0))


def pulls(node: Node, num_blocks: int = SHAPE[1]) -> bool:
    cache, blocks = node.blocks_cache(*SHAPE), list(range(num_blocks))
    node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, blocks, blocks)
    is_right = np.array_equal(
        node.arrays[cache.cache_id][:, :num_blocks], make_array(SHAPE, 1)[:, :num_blocks]
    )
    node.manager.unregister_cache(cache.cache_id)
    return is_right


def stats(node: Node) -> ClusterStats:
    return node.datadist.stats()


@pytest.fixture
def linked(node: Node, victim: NodeProcess, path: str) -> int:
    """The port of an owner that the node is linked to, by one stream at most."""
    port = victim.call(
        Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings(path)
    )
    victim.call(own)
    node.start(LLMRole.DECODER, 2, **settings(path))
    assert node.link(port, 1) == SUCCESS
    assert pulls(node, 1)
    return port


@contextmanager
def crowd(port: int) -> Iterator[list[Wire]]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        with ExitStack() as stack:
            yield [stack.enter_context(Wire.begin_to_dial(port)) for _ in range(CROWD)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_silent_crowd_keeps_no_link_from_its_streams(
    node: Node, victim: NodeProcess, linked: int
) -> None:
    with crowd(linked):
        with takes_at_most(SOON_S):
            assert pulls(node)
        with takes_at_most(SOON_S):
            assert node.unlink(linked, 1) == SUCCESS
            assert node.link(linked, 1) == SUCCESS
            assert pulls(node)
        assert eventually(lambda: victim.call(stats).num_turned_away >= CROWD - MOST_OF_ONE_ADDRESS)
        assert victim.call(stats).num_silent <= MOST_OF_ONE_ADDRESS
    assert eventually(lambda: victim.call(stats).num_silent == 0)


def test_a_silent_crowd_at_the_same_host_socket_keeps_no_link_from_its_streams(
    node: Node, victim: NodeProcess
) -> None:
    settings = {"sync_kv_timeout": 5000, "transfer_threads": 4}
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    victim.call(own)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) == SUCCESS
    with ExitStack() as stack, Wire.dial(port) as caller:
        caller.send(hello())
        at, _ = SameHost.offered(caller.expect(m.Welcome).offers["cma"])
        for _ in range(CROWD):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(at.sockaddr)  # the kernel waits while the listener's queue is full
            sock.settimeout(SOON_S)
        with takes_at_most(SOON_S):
            assert pulls(node)
            assert node.unlink(port, 1) == SUCCESS
            assert node.link(port, 1) == SUCCESS
            assert node.datadist.links()[0].path == "cma"
            assert pulls(node)


def test_hand_shakes_that_take_all_descriptors_make_room(
    node: Node, victim: NodeProcess, linked: int
) -> None:
    victim.call(limit_descriptors, 40)
    with ExitStack() as stack:
        for index in range(60):
            caller = stack.enter_context(Wire.dial(linked))
            caller.send(hello(instance=index.to_bytes(16, "big"), timeout_ms=60_000))
        with takes_at_most(SOON_S):
            assert pulls(node)
            assert node.unlink(linked, 1) == SUCCESS
            assert node.link(linked, 1) == SUCCESS
            assert pulls(node)


def test_a_crowd_that_takes_all_descriptors_makes_room(
    node: Node, victim: NodeProcess, linked: int
) -> None:
    victim.call(limit_descriptors, 40)
    with crowd(linked):
        with takes_at_most(SOON_S):
            assert pulls(node)
        with takes_at_most(SOON_S):
            assert node.unlink(linked, 1) == SUCCESS
            assert node.link(linked, 1) == SUCCESS
            assert pulls(node)


def limit_descriptors(_: Node, more: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + more, hard))


def test_the_log_tells_of_a_crowd_once(node: Node, victim: NodeProcess, linked: int) -> None:
    victim.call(keep_log)
    with crowd(linked):
        assert eventually(lambda: victim.call(stats).num_turned_away >= CROWD - MOST_OF_ONE_ADDRESS)
        assert pulls(node)
    assert victim.call(num_lines) <= 3


_lines: list[str] = []


def keep_log(_: Node) -> None:
    import logging

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _lines.append(record.getMessage())

    logger = logging.getLogger("LLM_DATADIST")
    logger.setLevel(logging.INFO)
    logger.addHandler(Keep())


def num_lines(_: Node) -> int:
    assert any("turned away" in line for line in _lines), _lines
    return len(_lines)
