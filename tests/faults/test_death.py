"""SIGKILL: of the owner, of the puller, of either end while linking. Each with a time budget."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from wire import Wire, hello

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array
from llm_datadist.testing.timing import eventually

SUCCESS = LLMStatusCode.LLM_SUCCESS
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK

SYNC_TIMEOUT_MS = 2000
#: a fifth over the timeout, and what two busy cores need to schedule a few processes
BUDGET_S = 1.2 * SYNC_TIMEOUT_MS / 1000 + 0.1
#: how soon the death of a peer is noticed, which the kernel tells at once
SOON_S = 1.0
#: pulled one after the other, they are met in the middle of one
SHAPE = (4, 16, 1 << 18)


@pytest.fixture
def settings(is_accessible: bool, path: str) -> dict[str, Any]:
    return {
        "enable_remote_cache_accessible": is_accessible,
        "transfer_path": path,
        "sync_kv_timeout": SYNC_TIMEOUT_MS,
    }


def own(node: Node, fill: int) -> None:
    cache = node.blocks_cache(*SHAPE, key=BlocksCacheKey(0, 0))
    node.arrays[cache.cache_id][:] = fill


def pull_for_ever(node: Node, cluster_id: int) -> None:
    """Until it fails."""
    cache = node.blocks_cache(*SHAPE)
    blocks = list(range(SHAPE[1]))
    while True:
        node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, blocks, blocks)


def pulled(node: Node, cluster_id: int) -> Bytes:
    """All of a peer's cache."""
    cache = node.blocks_cache(*SHAPE)
    blocks = list(range(SHAPE[1]))
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, blocks, blocks)
    return node.arrays[cache.cache_id]


def linked_ids(node: Node) -> list[int]:
    return [link.cluster_id for link in node.datadist.links()]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.shows("relies.16", "link.again_after_crash")
def test_the_owner_dies_in_a_stream_of_pulls_and_comes_back(
    node: Node, victim: NodeProcess, settings: dict[str, Any]
) -> None:
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    victim.call(own, 7)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) == SUCCESS
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(pull_for_ever, node, 1)
        assert eventually(lambda: bool(node.arrays) and bool(node.arrays[1][-1, -1, -1] == 7))
        killed = time.monotonic()
        victim.kill()
        with pytest.raises(LLMException) as error:
            pulling.result(20)
        assert time.monotonic() - killed <= BUDGET_S
    assert error.value.status_code == NOT_YET_LINK
    assert eventually(lambda: linked_ids(node) == [], SOON_S)
    with pytest.raises(LLMException, match="the last link ended because") as error:
        pulled(node, 1)
    assert error.value.status_code == NOT_YET_LINK
    with NodeProcess() as successor:
        listen_ip_info = f"127.0.0.1:{port}"
        assert (
            successor.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info=listen_ip_info, **settings)
            == port
        )
        successor.call(own, 9)
        assert node.link(port, 1) == SUCCESS, "without unlinking the dead one first"
        assert (pulled(node, 1) == 9).all()
        assert linked_ids(node) == [1]


@pytest.mark.shows("relies.16")
def test_a_successor_is_reached_while_the_dead_owner_is_not_yet_missed(
    node: Node, victim: NodeProcess, path: str
) -> None:
    """The programs' own recovery: unlink by force, link again; the port is taken over at once."""
    settings: dict[str, Any] = {"transfer_path": path}
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) == SUCCESS
    with NodeProcess() as successor:
        victim.kill()
        successor.call(
            Node.start, LLMRole.PROMPT, 1, listen_ip_info=f"127.0.0.1:{port}", **settings
        )
        successor.call(own, 9)
        assert node.unlink(port, 1, force=True) == SUCCESS
        assert node.link(port, 1) == SUCCESS
        assert (pulled(node, 1) == 9).all()


def test_the_puller_dies_and_the_owner_serves_the_next_one(
    node: Node, peer: NodeProcess, victim: NodeProcess, settings: dict[str, Any]
) -> None:
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    own(node, 7)
    before = descriptors()
    victim.call(Node.start, LLMRole.DECODER, 2, **settings)
    assert victim.call(Node.link, port, 1) == SUCCESS
    victim.begin(pull_for_ever, 1)
    peer.call(Node.start, LLMRole.DECODER, 3, **settings)
    assert peer.call(Node.link, port, 1) == SUCCESS
    assert (peer.call(pulled, 1) == 7).all(), "beside the victim"
    victim.kill()
    assert eventually(lambda: linked_ids(node) == [3], SOON_S)
    assert (peer.call(pulled, 1) == 7).all()
    peer.call(Node.stop)
    assert eventually(lambda: linked_ids(node) == [])
    assert eventually(lambda: descriptors() <= before)


def test_the_puller_dies_in_its_first_pull(
    node: Node, peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    settings: dict[str, Any] = {"transfer_path": path}
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    own(node, 7)
    before = descriptors()
    victim.call(Node.start, LLMRole.DECODER, 2, **settings)
    assert victim.call(Node.link, port, 1) == SUCCESS
    victim.begin(pull_for_ever, 1)
    victim.kill()
    assert eventually(lambda: linked_ids(node) == [], SOON_S)
    peer.call(Node.start, LLMRole.DECODER, 2, **settings)
    assert peer.call(Node.link, port, 1) == SUCCESS
    assert (peer.call(pulled, 1) == 7).all()
    peer.call(Node.stop)
    assert eventually(lambda: descriptors() <= before)


@pytest.mark.shows("link.again_after_crash")
def test_a_caller_that_crashed_is_replaced_by_its_successor_at_once(
    node: Node, peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    """The listener need not have noticed, and nobody cleans up."""
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", transfer_path=path)
    own(node, 7)
    victim.call(Node.start, LLMRole.DECODER, 2, transfer_path=path)
    victim.call(own, 8)
    peer.call(Node.start, LLMRole.DECODER, 2, transfer_path=path)
    peer.call(own, 9)
    assert victim.call(Node.link, port, 1) == SUCCESS
    assert (pulled(node, 2) == 8).all()
    victim.kill()
    assert peer.call(Node.link, port, 1) == SUCCESS
    assert (peer.call(pulled, 1) == 7).all()
    assert (pulled(node, 2) == 9).all()
    assert eventually(lambda: linked_ids(node) == [2], SOON_S)


def test_the_listener_dies_while_it_is_linked_to(node: Node, victim: NodeProcess) -> None:
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    node.start(LLMRole.DECODER, 2)
    victim.pause()
    with ThreadPoolExecutor(1) as pool:
        linking = pool.submit(node.link, port, 1, 20_000)
        with pytest.raises(TimeoutError):
            linking.result(0.2)  # it waits for the listener, which stands still
        killed = time.monotonic()
        victim.kill()
        assert linking.result(20) == LLMStatusCode.LLM_FAILED
        assert time.monotonic() - killed <= SOON_S
    assert linked_ids(node) == []


def test_callers_die_while_they_link(node: Node, peer: NodeProcess) -> None:
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", transfer_path="tcp")
    own(node, 7)
    victims = [NodeProcess() for _ in range(3)]
    before = descriptors()
    for victim in victims:
        victim.call(Node.start, LLMRole.DECODER, 2, transfer_path="tcp")
        victim.begin(Node.link, port, 1)
        victim.kill()
    assert eventually(lambda: linked_ids(node) == [], SOON_S)
    assert eventually(lambda: descriptors() <= before)
    peer.call(Node.start, LLMRole.DECODER, 2, transfer_path="tcp")
    assert peer.call(Node.link, port, 1) == SUCCESS
    assert (peer.call(pulled, 1) == 7).all()


@pytest.mark.parametrize("says_ready", [False, True])
def test_a_caller_that_is_gone_ends_its_hand_shake_at_once(node: Node, says_ready: bool) -> None:
    """Wherever it was, and not only when the time for the hand-shake is over."""
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", transfer_path="tcp")
    before = descriptors()
    with Wire.dial(port) as wire:
        wire.send(hello(timeout_ms=60_000))
        wire.expect(m.Welcome)
        if says_ready:
            wire.send(m.Ready("tcp"))
            wire.expect(m.DialBack)
    assert eventually(lambda: descriptors() <= before, SOON_S)


def test_an_owner_that_dies_leaves_other_links_alone(
    node: Node, peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    ports = {}
    for cluster_id, process in ((1, victim), (3, peer)):
        ports[cluster_id] = process.call(
            Node.start,
            LLMRole.PROMPT,
            cluster_id,
            listen_ip_info="127.0.0.1:0",
            transfer_path=path,
        )
        process.call(own, cluster_id)
    node.start(LLMRole.DECODER, 2, transfer_path=path, sync_kv_timeout=SYNC_TIMEOUT_MS)
    assert [node.link(port, cluster_id) for cluster_id, port in ports.items()] == [SUCCESS, SUCCESS]
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(pull_for_ever, node, 1)
        assert eventually(lambda: bool(node.arrays) and bool(node.arrays[1][-1, -1, -1] == 1))
        victim.kill()
        for _ in range(3):
            assert (pulled(node, 3) == 3).all()
        with pytest.raises(LLMException):
            pulling.result(20)
    assert linked_ids(node) == [3]


def test_a_dead_owners_pid_is_not_read_again(node: Node, victim: NodeProcess) -> None:
    """A pull by addresses known from before must not take another process for the owner."""
    settings = {"enable_remote_cache_accessible": True, "transfer_path": "cma"}
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    victim.call(own, 7)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) == SUCCESS
    assert (pulled(node, 1) == 7).all()
    cache = node.blocks_cache(*SHAPE, seed=None)
    before = make_array(SHAPE, None)
    victim.kill()
    with pytest.raises(LLMException) as error:
        node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0], [0])
    assert error.value.status_code == NOT_YET_LINK
    assert np.array_equal(node.arrays[cache.cache_id], before)
