"""An owner, and a user of its cache whose memory is watched: what each test here starts with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode, Placement

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.testing.cluster import Bytes, Node

SUCCESS = LLMStatusCode.LLM_SUCCESS
#: of each cache: large enough to be moved by several threads
SHAPE = (2, 16, 1 << 18)
SMALL = (2, 16, 512)
KEY = BlocksCacheKey(1, 0)
EVERY = list(range(SHAPE[1]))
HALF = SHAPE[1] // 2
#: what is in the owner's cache, in those of the user, and in memory that is the program's again
OWNED, EMPTY, SENT, HOSTED, LATER = 0x77, 0, 0x55, 0x66, 0x11
#: so often memory is looked at that must not change any more
LOOKS = 20


def settings(path: str, timeout_ms: int = 5000) -> dict[str, Any]:
    return {
        "transfer_path": path,
        "enable_remote_cache_accessible": True,
        "sync_kv_timeout": timeout_ms,
        "transfer_threads": 4,
    }


def start_owner(
    node: Node,
    path: str,
    timeout_ms: int = 5000,
    shape: tuple[int, int, int] = SHAPE,
    port: int = 0,
) -> int:
    """Cluster 1, whose cache 1 can be pulled and pushed to; its port."""
    address = f"127.0.0.1:{port}"
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info=address, **settings(path, timeout_ms))
    cache = node.blocks_cache(*shape, key=BlocksCacheKey(0, 0))
    node.arrays[cache.cache_id][:] = OWNED
    return port


class User:
    """Cluster 2 on a node, linked to the owner; each verb moves whole caches by one call."""

    def __init__(
        self,
        node: Node,
        path: str,
        port: int,
        timeout_ms: int = 5000,
        shape: tuple[int, int, int] = SHAPE,
    ) -> None:
        node.start(LLMRole.DECODER, 2, **settings(path, timeout_ms))
        assert node.link(port, 1) == SUCCESS
        self.node = node
        self.manager = node.manager
        self.sink, self.source = node.blocks_cache(*shape), node.blocks_cache(*shape)
        self.host = node.blocks_cache(*shape, placement=Placement.HOST)
        self.into = self.array_of(self.sink)
        self.array_of(self.source)[:] = SENT
        self.array_of(self.host)[:] = HOSTED
        self.arrays = list(node.arrays.values())
        self.verbs: dict[str, Callable[[], None]] = {
            "pull": self.pull,
            "push": self.push,
            "copy": self.copy,
            "swap": self.swap,
        }

    def array_of(self, cache: Any) -> Bytes:
        return self.node.arrays[cache.cache_id]

    def pull(self) -> None:
        self.manager.pull_blocks(KEY, self.sink, EVERY, EVERY)

    def push(self) -> None:
        self.manager.push_blocks(KEY, self.source, EVERY, EVERY)

    def copy(self) -> None:
        self.manager.copy_blocks(self.sink, {block: [block + HALF] for block in range(HALF)})

    def swap(self) -> None:
        self.manager.swap_blocks(self.host, self.sink, {block: block for block in EVERY})

    def take_back(self) -> None:
        """The program has its memory again, and writes to it."""
        for array in self.arrays:
            array[:] = LATER

    def is_left_alone(self) -> bool:
        """Whether nobody but the program has written to its memory since `take_back`."""
        return all(holds_only(array, LATER) for _ in range(LOOKS) for array in self.arrays)


def holds_only(array: Bytes, value: int) -> bool:
    return bool((array == value).all())


def values_of(node: Node, cache_id: int = 1) -> set[int]:
    """Which bytes there are in a cache of the node."""
    return set(np.flatnonzero(np.bincount(node.arrays[cache_id].ravel())).tolist())


def has(node: Node, value: int) -> bool:
    return bool((node.arrays[1] == value).any())


def refill(node: Node, value: int, cache_id: int = 1) -> None:
    node.arrays[cache_id][:] = value


def never_holds(process: Any, value: int) -> bool:
    """Whether the owner in the process does not get to see the value, as often as one looks."""
    return not any(process.call(has, value) for _ in range(LOOKS))


def status_of(call: Callable[[], object]) -> LLMStatusCode:
    """How it ended; what is no LLMException is raised."""
    try:
        call()
    except LLMException as error:
        return error.status_code
    return SUCCESS
