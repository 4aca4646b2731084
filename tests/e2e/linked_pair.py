"""A node here, linked to one in another process (cluster 1), and what the other one runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess

SUCCESS = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
GONE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
NO_ID = 2**64 - 1


@dataclass
class Pair:
    """Cluster 2 here, linked to cluster 1 in another process."""

    node: Node
    peer: NodeProcess
    is_accessible: bool = True

    def theirs(self, cache_id: int) -> Bytes:
        return self.peer.call(array_of, cache_id)


def make_pair(
    node: Node,
    peer: NodeProcess,
    path: str,
    *,
    is_accessible: bool,
    role: LLMRole = LLMRole.DECODER,
    mem_pool_cfg: str | None = None,
) -> Pair:
    """`role` is that of the node here, which alone has the pool."""
    settings: dict[str, object] = {
        "enable_remote_cache_accessible": is_accessible,
        "transfer_path": path,
    }
    other = LLMRole.PROMPT if role == LLMRole.DECODER else LLMRole.DECODER
    port = peer.call(Node.start, other, 1, listen_ip_info="127.0.0.1:0", **settings)
    if mem_pool_cfg is not None:
        settings["mem_pool_cfg"] = mem_pool_cfg
    node.start(role, 2, **settings)
    assert node.link(port, 1) == SUCCESS
    assert [link.path for link in node.datadist.links()] == [path]
    return Pair(node, peer, is_accessible)


@pytest.fixture
def pair(node: Node, peer: NodeProcess, is_accessible: bool, path: str) -> Pair:
    """A decode node here, in either mode."""
    return make_pair(node, peer, path, is_accessible=is_accessible)


@pytest.fixture
def pusher(node: Node, peer: NodeProcess, path: str) -> Pair:
    """A prefill node here, in remote-accessible mode."""
    return make_pair(node, peer, path, is_accessible=True, role=LLMRole.PROMPT)


@pytest.fixture
def two_sided(node: Node, peer: NodeProcess, path: str) -> Pair:
    """A prefill node here, in two-sided mode."""
    return make_pair(node, peer, path, is_accessible=False, role=LLMRole.PROMPT)


def status_of(error: pytest.ExceptionInfo[LLMException]) -> LLMStatusCode:
    return error.value.status_code


# -- run by the peer --


array_of = Node.array_of


def add_blocks(node: Node, *args: object, **kwargs: object) -> int:
    return node.blocks_cache(*args, **kwargs).cache_id  # type: ignore[arg-type]


def add_rows(node: Node, *args: object, **kwargs: object) -> int:
    return node.rows_cache(*args, **kwargs).cache_id  # type: ignore[arg-type]


def unregister(node: Node, cache_id: int) -> None:
    node.manager.unregister_cache(cache_id)
