"""Two processes with a failing network between them, and what is asked of each pull and push."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llm_datadist.testing.cluster import Bytes

SUCCESS = LLMStatusCode.LLM_SUCCESS
FAILED = LLMStatusCode.LLM_FAILED
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK

SYNC_TIMEOUT_MS = 500
#: where the time is not looked at
PATIENT_MS = 5000
#: a fifth over the timeout, and what two busy cores need to schedule a few processes
BUDGET_S = 1.2 * SYNC_TIMEOUT_MS / 1000 + 0.1
SOON_S = 2.0
#: 2 MiB are moved of it
SHAPE = (4, 32, 1 << 15)
SRC = list(range(1, 32, 2))
DST = SRC[::-1]
MOVED_NBYTES = SHAPE[0] * len(SRC) * SHAPE[2]
FILL = 0xEE


@pytest.fixture(scope="module")
def bystander_process() -> Iterator[NodeProcess]:
    with NodeProcess() as process:
        yield process


@pytest.fixture
def bystander(bystander_process: NodeProcess) -> Iterator[NodeProcess]:
    """Another process, whose link does not lead through the proxy; its node ends with the test."""
    yield bystander_process
    bystander_process.call(Node.stop)


@dataclass
class Ends:
    """Cluster 2 here; cluster 1 in another process behind a proxy; cluster 3 without one."""

    node: Node
    peer: NodeProcess
    proxy: FaultProxy
    other_port: int
    settings: dict[str, Any] = field(default_factory=dict)

    def link(self) -> LLMStatusCode:
        return self.node.link(self.proxy.port, 1, SYNC_TIMEOUT_MS)

    def unlink(self, *, force: bool = False) -> LLMStatusCode:
        return self.node.unlink(self.proxy.port, 1, SYNC_TIMEOUT_MS, force=force)

    def pull(self, cluster_id: int = 1, dst: list[int] = DST) -> LLMStatusCode:
        """No false success, and nothing but the destination is touched: checked each time."""
        with self.destination(cluster_id, dst) as pull:
            return pull()

    @contextmanager
    def destination(
        self, cluster_id: int = 1, dst: list[int] = DST
    ) -> Iterator[Callable[[], LLMStatusCode]]:
        """A pull into memory that is looked at once more when the block under it ends."""
        node, src = self.node, SRC[: len(dst)]
        cache = node.blocks_cache(*SHAPE)
        array = node.arrays[cache.cache_id]
        array[:] = FILL

        def pull() -> LLMStatusCode:
            try:
                node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, src, dst)
            except LLMException as error:
                return error.status_code
            np.testing.assert_array_equal(array[:, dst], source_of(cluster_id)[:, src])
            return SUCCESS

        yield pull
        assert_untouched(array, dst)
        node.manager.unregister_cache(cache.cache_id)
        del node.arrays[cache.cache_id], node.caches[cache.cache_id]

    def push(self, blocks: list[int] = DST) -> LLMStatusCode:
        """Into the peer's cache, which is looked at the same way."""
        self.peer.call(refill)
        cache = next(iter(self.node.caches.values()))
        status = SUCCESS
        try:
            self.node.manager.push_blocks(BlocksCacheKey(1, 0), cache, SRC[: len(blocks)], blocks)
        except LLMException as error:
            status = error.status_code
        array = self.peer.call(only_array)
        if status == SUCCESS:
            np.testing.assert_array_equal(array[:, blocks], source_of(2)[:, SRC[: len(blocks)]])
        assert_untouched(array, blocks)
        return status

    def is_unlinked_at_both_ends(self) -> bool:
        return eventually(
            lambda: (linked_ids(self.node), self.peer.call(linked_ids)) == ([3], []), SOON_S
        )

    def works_again(self) -> bool:
        """Restores the network, links, and moves verified bytes."""
        self.proxy.restore()
        assert self.node.link(self.proxy.port, 1, PATIENT_MS) == SUCCESS
        return self.pull() == SUCCESS == self.pull(3)


def start(
    node: Node, peer: NodeProcess, bystander: NodeProcess, proxy: FaultProxy, **settings: Any
) -> Ends:
    other_port = bystander.call(Node.start, LLMRole.PROMPT, 3, listen_ip_info="127.0.0.1:0",
                                **settings)  # fmt: skip
    bystander.call(own, 3)
    node.start(LLMRole.DECODER, 2, **settings)
    ends = Ends(node, peer, proxy, other_port, settings)
    assert node.link(proxy.port, 1) == SUCCESS == node.link(other_port, 3)
    assert ends.pull() == SUCCESS == ends.pull(3)
    return ends


def start_owner(peer: NodeProcess, **settings: Any) -> int:
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    peer.call(own, 1)
    return port


@pytest.fixture
def settings(is_accessible: bool) -> dict[str, Any]:
    return {
        "enable_remote_cache_accessible": is_accessible,
        "transfer_path": "tcp",
        "sync_kv_timeout": SYNC_TIMEOUT_MS,
    }


@pytest.fixture
def ends(
    node: Node, peer: NodeProcess, bystander: NodeProcess, settings: dict[str, Any]
) -> Iterator[Ends]:
    with FaultProxy(start_owner(peer, **settings)) as proxy:
        yield start(node, peer, bystander, proxy, **settings)


@pytest.fixture
def pushing(node: Node, peer: NodeProcess) -> Iterator[Ends]:
    """A prefill node here, whose peer has one cache to push to."""
    settings: dict[str, Any] = {
        "enable_remote_cache_accessible": True,
        "transfer_path": "tcp",
        "sync_kv_timeout": SYNC_TIMEOUT_MS,
    }
    port = peer.call(Node.start, LLMRole.DECODER, 1, listen_ip_info="127.0.0.1:0", **settings)
    peer.call(own, 1)
    node.start(LLMRole.PROMPT, 2, **settings)
    own(node, 2)
    with FaultProxy(port) as proxy:
        ends = Ends(node, peer, proxy, 0, settings)
        assert ends.link() == SUCCESS
        assert ends.push() == SUCCESS
        yield ends


def own(node: Node, seed: int) -> None:
    node.blocks_cache(*SHAPE, seed=seed, key=BlocksCacheKey(0, 0))


@cache
def source_of(cluster_id: int) -> Bytes:
    return make_array(SHAPE, cluster_id)


def refill(node: Node) -> None:
    only_array(node)[:] = FILL


def only_array(node: Node) -> Bytes:
    (array,) = node.arrays.values()
    return array


def linked_ids(node: Node) -> list[int]:
    return [link.cluster_id for link in node.datadist.links()]


def assert_untouched(array: Bytes, but: list[int]) -> None:
    others = np.delete(array, but, axis=1)
    assert (others == FILL).all(), "a block that was not asked for was written to"
