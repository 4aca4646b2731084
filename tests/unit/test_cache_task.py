"""CacheTask and LayerSynchronizer in a transfer between two processes. Spec 3.10."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from llm_datadist import (
    BlocksCacheKey,
    LayerSynchronizer,
    LLMRole,
    LLMStatusCode,
    TransferWithCacheKeyConfig,
)
from llm_datadist.testing.cluster import Node
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from llm_datadist.cache_task import CacheTask
    from llm_datadist.testing.cluster import NodeProcess

SUCCESS = LLMStatusCode.LLM_SUCCESS
TIMEOUT = LLMStatusCode.LLM_TIMEOUT


class Gate(LayerSynchronizer):
    """Lets layers pass once it is open; remembers what it was called with."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.calls: list[tuple[int, object]] = []

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        self.calls.append((layer_index, timeout_in_millis))
        return self.opened.wait(60)


def receive(node: Node) -> None:
    node.blocks_cache(6, 4, 64, key=BlocksCacheKey(1))


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def task(node: Node, peer: NodeProcess, gate: Gate) -> CacheTask:
    """A transfer of three layers that waits at the gate."""
    access = {"enable_remote_cache_accessible": True}
    port = peer.call(Node.start, LLMRole.DECODER, 1, listen_ip_info="127.0.0.1:0", **access)
    peer.call(receive)
    node.start(LLMRole.PROMPT, 2, **access)
    assert node.link(port, 1) == SUCCESS
    cache = node.blocks_cache(6, 4, 64, seed=1)
    configs = [TransferWithCacheKeyConfig(BlocksCacheKey(1), range(3), range(3))]
    return node.manager.transfer_cache_async(cache, gate, configs, [1], [2])


@pytest.mark.shows("layer_synchronizer")
def test_a_synchronizer_is_called_with_each_layer_and_none(task: CacheTask, gate: Gate) -> None:
    gate.opened.set()
    assert task.synchronize() == SUCCESS
    assert gate.calls == [(0, None), (1, None), (2, None)]


@pytest.mark.shows("cache_task")
def test_a_task_can_be_polled_and_asked_again(task: CacheTask, gate: Gate) -> None:
    with takes_at_most(0.5):
        for _ in range(2):
            assert (task.synchronize(0), task.get_results(0)) == (TIMEOUT, [TIMEOUT])
    gate.opened.set()
    for timeout in (None, 2**32 - 1, 0):
        assert (task.synchronize(timeout), task.get_results(timeout)) == (SUCCESS, [SUCCESS])


@pytest.mark.shows("cache_task")
@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        ("1", TypeError),
        (1.0, TypeError),
        (True, TypeError),
        (-1, ValueError),
        (2**32, ValueError),
    ],
)
def test_the_timeout_of_a_task_is_a_uint32(
    task: CacheTask, gate: Gate, timeout: Any, error: type[Exception]
) -> None:
    for ask in (task.synchronize, task.get_results):
        with pytest.raises(error, match="timeout_in_millis"):
            ask(timeout)
    gate.opened.set()
    assert task.get_results() == [SUCCESS]
