"""A layer-wise transfer is what was asked for when it was begun, and its task is bounded."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from edges.user import KEY, OWNED, SENT, SUCCESS, User, start_owner
from llm_datadist import LayerSynchronizer, LLMStatusCode, TransferWithCacheKeyConfig
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Bytes, Node, NodeProcess

SHAPE = (4, 8, 4096)
TIMEOUT = LLMStatusCode.LLM_TIMEOUT


class Stepped(LayerSynchronizer):
    """Lets a layer go when the test says so."""

    def __init__(self) -> None:
        self.asked, self.let_go = threading.Semaphore(0), threading.Semaphore(0)

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        self.asked.release()
        return self.let_go.acquire(timeout=30)


def array_of(node: Node) -> Bytes:
    return node.arrays[1]


def test_the_callers_lists_and_configs_are_the_callers_again_when_the_call_returns(
    node: Node, peer: NodeProcess, path: str
) -> None:
    user = User(node, path, peer.call(start_owner, path, shape=SHAPE), shape=SHAPE)
    step, src, dst = Stepped(), [0, 1, 2], [5, 6, 7]
    config = TransferWithCacheKeyConfig(KEY, range(2), range(2))
    configs = [config]
    task = user.manager.transfer_cache_async(user.source, step, configs, src, dst)
    assert step.asked.acquire(timeout=10)
    src[:], dst[:] = [3, 3, 3], [0, 1, 2]
    configs.clear()
    config.src_layer_range = config.dst_layer_range = range(1)
    config.cache_key = None
    step.let_go.release(2)
    assert task.synchronize(10_000) == SUCCESS
    theirs = peer.call(array_of)
    assert (theirs[:, dst] == OWNED).all()
    assert (theirs[:, [5, 6, 7]] == SENT).all()
    assert np.array_equal(theirs[:, [3, 4]], np.full_like(theirs[:, [3, 4]], OWNED))


def test_waiting_for_a_task_is_bounded_and_may_be_repeated(
    node: Node, peer: NodeProcess, path: str
) -> None:
    user = User(node, path, peer.call(start_owner, path, shape=SHAPE), shape=SHAPE)
    step, blocks = Stepped(), list(range(SHAPE[1]))
    configs = [TransferWithCacheKeyConfig(KEY, range(1), range(1))]
    task = user.manager.transfer_cache_async(user.source, step, configs, blocks, blocks)
    assert step.asked.acquire(timeout=10)
    for timeout_ms in (0, 1, 50):
        with takes_at_most(1.0):
            assert task.synchronize(timeout_ms) == TIMEOUT
            assert task.get_results(timeout_ms) == [TIMEOUT]
    step.let_go.release()
    assert task.get_results(10_000) == [SUCCESS]
    assert task.synchronize(0) == SUCCESS
    task.get_results(0).clear()
    assert task.get_results(0) == [SUCCESS]
