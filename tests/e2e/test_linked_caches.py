"""What a hand-shake tells of caches: the first pull of a caller needs nobody's answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.core.messages import MAX_TOLD_CACHES, MAX_TOLD_NBYTES
from llm_datadist.testing.cluster import Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Iterator

SUCCESS = LLMStatusCode.LLM_SUCCESS
KEY = BlocksCacheKey(1, 0)
SHAPE = (2, 4, 4096)
BLOCKS = [0, 1, 2, 3]


@pytest.fixture
def pausable(peer: NodeProcess) -> Iterator[NodeProcess]:
    yield peer
    peer.resume()


def start(node: Node, peer: NodeProcess) -> int:
    settings: dict[str, object] = {
        "enable_remote_cache_accessible": True, "transfer_path": "cma", "sync_kv_timeout": 500,
    }  # fmt: skip
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    return port


def add(peer: NodeProcess, number: int, shape: tuple[int, int, int] = SHAPE) -> None:
    peer.call(Node.add_blocks, *shape, seed=number, key=BlocksCacheKey(1, number))


def pull(node: Node, number: int) -> None:
    """Raises LLMException, as the pull does; the bytes are right."""
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(BlocksCacheKey(1, number), cache, BLOCKS, BLOCKS)
    np.testing.assert_array_equal(node.arrays[cache.cache_id], make_array(SHAPE, number))


@pytest.mark.parametrize("count", [1, (MAX_TOLD_CACHES - 1) // 2])
def test_the_first_pull_behind_a_link_asks_nobody(
    node: Node, pausable: NodeProcess, count: int
) -> None:
    port = start(node, pausable)
    for number in range(count):  # a cache and a key each
        add(pausable, number)
    assert node.link(port, 1) == SUCCESS
    pausable.pause()
    for number in range(count):
        pull(node, number)


def test_what_came_behind_the_link_is_asked_for(node: Node, pausable: NodeProcess) -> None:
    port = start(node, pausable)
    add(pausable, 0)
    assert node.link(port, 1) == SUCCESS
    add(pausable, 1)
    pausable.pause()
    with pytest.raises(LLMException) as caught:
        pull(node, 1)
    assert caught.value.status_code is LLMStatusCode.LLM_TIMEOUT
    pausable.resume()
    pull(node, 1)
    pull(node, 0)


def test_what_has_changed_since_is_found_out(node: Node, peer: NodeProcess) -> None:
    port = start(node, peer)
    old = peer.call(Node.add_blocks, *SHAPE, seed=7, key=KEY)
    assert node.link(port, 1) == SUCCESS
    peer.call(unregister, old)
    with pytest.raises(LLMException) as caught:
        pull(node, 0)
    assert caught.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    add(peer, 0)
    pull(node, 0)


def unregister(node: Node, cache_id: int) -> None:
    node.manager.unregister_cache(cache_id)


@pytest.mark.parametrize(
    ("count", "shape"),
    [
        pytest.param(MAX_TOLD_CACHES, SHAPE, id="many caches"),
        pytest.param(1, (MAX_TOLD_NBYTES // 8 + 1, 1, 8), id="many tensors"),
    ],
)
def test_of_much_nothing_is_told(
    node: Node, pausable: NodeProcess, count: int, shape: tuple[int, int, int]
) -> None:
    """A hand-shake stays small; the first pull then fetches the table, as ever."""
    port = start(node, pausable)
    for number in range(count):
        add(pausable, number, shape)
    assert node.link(port, 1) == SUCCESS
    cache = node.blocks_cache(*shape)
    pausable.pause()
    with pytest.raises(LLMException) as caught:
        node.manager.pull_blocks(KEY, cache, [0], [0])
    assert caught.value.status_code is LLMStatusCode.LLM_TIMEOUT
    pausable.resume()
    node.manager.pull_blocks(KEY, cache, [0], [0])
    np.testing.assert_array_equal(node.arrays[cache.cache_id][:, 0], make_array(shape, 0)[:, 0])
