"""Members of a fleet for tests: nodes that follow a folder, here and in processes of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    Follower,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Wants,
)
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from pathlib import Path

TTL_S = 1.5
#: what a busy machine needs to see a change, and to link
SOON_S = 10.0
PROMPTS = Wants([LLMRole.PROMPT])

SHAPE = (2, 8, 64)
#: what a pull may end with while its owner restarts
PASSING = (
    LLMStatusCode.LLM_NOT_YET_LINK,
    LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
    LLMStatusCode.LLM_TIMEOUT,
    LLMStatusCode.LLM_FAILED,
)

_followers: dict[int, Follower] = {}


def follow(node: Node, folder: Path, wants: Wants | None = None, **said: Any) -> None:
    said.setdefault("ttl_s", TTL_S)
    _followers[id(node)] = node.datadist.follow(f"folder:{folder}", wants, **said)


def follower_of(node: Node) -> Follower:
    return _followers[id(node)]


def join(
    process: NodeProcess, folder: Path, cluster_id: int = 1, seed: int = 5, **settings: Any
) -> int:
    """A prefill in its process, which has a cache to pull; its port."""
    settings.setdefault("listen_ip_info", "127.0.0.1:0")
    port = process.call(Node.start, LLMRole.PROMPT, cluster_id, **settings)
    process.call(publish, seed)
    process.call(follow, folder)
    return port


def publish(node: Node, seed: int) -> None:
    node.blocks_cache(*SHAPE, seed=seed, key=BlocksCacheKey(0, 0))


def pulls(node: Node, cluster_id: int = 1, seed: int = 5) -> bool:
    """Whether a pull from that cluster moves the right bytes. Raises LLMException."""
    cache = node.blocks_cache(*SHAPE)
    try:
        node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, [0, 7, 3], [5, 1, 2])
        expected = make_array(SHAPE, seed)[:, [0, 7, 3]]
        return bool(np.array_equal(node.arrays[cache.cache_id][:, [5, 1, 2]], expected))
    finally:
        node.manager.unregister_cache(cache.cache_id)


def linked_ids(node: Node) -> list[int]:
    return sorted(link.cluster_id for link in node.datadist.links())


def says(node: Node, cluster_id: int, state: str) -> bool:
    """Whether the fleet has that member in that state."""
    return any(
        each.record.cluster_id == cluster_id and each.state == state
        for each in follower_of(node).members()
    )


def is_linked(node: Node, cluster_id: int = 1) -> bool:
    return cluster_id in linked_ids(node)


def pulls_soon(node: Node, cluster_id: int = 1, seed: int = 5) -> bool:
    """Whether the right bytes can be pulled in time; wrong ones are never taken for them."""

    def pulls_now() -> bool:
        try:
            assert pulls(node, cluster_id, seed), "a pull succeeded with wrong bytes"
        except LLMException as error:
            if error.status_code not in PASSING:
                raise
            return False
        return True

    return eventually(pulls_now, SOON_S)


# -- in a peer's process --


def incarnation_of(node: Node) -> str:
    return follower_of(node).record.incarnation


def stop_following(node: Node) -> None:
    follower_of(node).stop()


def is_superseded(node: Node) -> bool:
    fleet = node.datadist.stats().fleet
    return fleet is not None and "has announced itself" in fleet.problem
