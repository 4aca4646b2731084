"""Peers to link to, and what tests of links ask of them."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    LLMClusterInfo,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Iterator

SUCCESS = LLMStatusCode.LLM_SUCCESS
ALREADY_LINK = LLMStatusCode.LLM_ALREADY_LINK
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
UNLINK_FAILED = LLMStatusCode.LLM_UNLINK_FAILED
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
TIMEOUT = LLMStatusCode.LLM_TIMEOUT

SEED = 5
SHAPE = (2, 8, 64)
#: more than sockets hold: an owner that stands still keeps back a part of it
LARGE = (4, 64, 1 << 20)
LARGE_FILL = 7

#: what takes no waiting, on a busy machine
SOON_S = 2.0


@pytest.fixture(scope="module")
def other_process() -> Iterator[NodeProcess]:
    """A second process for all tests that do not harm it."""
    with NodeProcess() as process:
        yield process


@pytest.fixture
def other(other_process: NodeProcess) -> Iterator[NodeProcess]:
    yield other_process
    other_process.call(Node.stop)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Where connections are accepted by the kernel and nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock:
        yield sock.getsockname()[1]


def budget_s(timeout_ms: int) -> float:
    """A fifth over the timeout, and what two busy cores need to schedule a few processes."""
    return 1.2 * timeout_ms / 1000 + 0.1


def dead_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def listen(peer: NodeProcess, cluster_id: int = 1, seed: int = SEED, **settings: Any) -> int:
    """Starts a listening node that has one cache to pull; its port."""
    settings.setdefault("listen_ip_info", "127.0.0.1:0")
    port = peer.call(Node.start, LLMRole.PROMPT, cluster_id, **settings)
    peer.call(publish, seed)
    return port


def settings_of(is_accessible: bool, path: str) -> dict[str, Any]:
    return {"enable_remote_cache_accessible": is_accessible, "transfer_path": path}


def publish(node: Node, seed: int) -> None:
    node.blocks_cache(*SHAPE, seed=seed, key=BlocksCacheKey(0, 0))


def pulls(node: Node, cluster_id: int, seed: int = SEED) -> bool:
    """Whether a pull from that cluster moves the right bytes."""
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, [0, 7, 3], [5, 1, 2])
    expected = make_array(SHAPE, seed)[:, [0, 7, 3]]
    right = np.array_equal(node.arrays[cache.cache_id][:, [5, 1, 2]], expected)
    node.manager.unregister_cache(cache.cache_id)
    return right


def pull_status(node: Node, cluster_id: int, seed: int = SEED) -> LLMStatusCode:
    """SUCCESS for the right bytes."""
    try:
        assert pulls(node, cluster_id, seed)
    except LLMException as error:
        return error.status_code
    return SUCCESS


def linked_ids(node: Node) -> list[int]:
    return sorted(link.cluster_id for link in node.datadist.links())


def link_list(node: Node) -> list[tuple[int, str, str, tuple[str, int] | None]]:
    return [tuple(link)[:4] for link in node.datadist.links()]  # type: ignore[misc]


def publish_large(node: Node) -> None:
    cache = node.blocks_cache(*LARGE, key=BlocksCacheKey(0, 1))
    node.arrays[cache.cache_id][:] = LARGE_FILL


def pulls_large(node: Node, cluster_id: int) -> bool:
    cache = node.blocks_cache(*LARGE)
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 1), cache, [1, 2, 3], [4, 5, 6])
    return bool((node.arrays[cache.cache_id][:, 4:7] == LARGE_FILL).all())


def descriptors(_: Node) -> int:
    return len(os.listdir("/proc/self/fd"))


def unlink_id(node: Node, cluster_id: int, *, force: bool) -> LLMStatusCode:
    """Unlinks as a listener does that never knew its caller's address."""
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    if not force:
        info.append_remote_ip_info("127.0.0.1", 1)
    return node.datadist.unlink_clusters([info], 3000, force)[1][0]
