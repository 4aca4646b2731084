"""The ends of links that a case harms: their settings, processes, and memory in frames."""

from __future__ import annotations

import ctypes
import json
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_datadist import BlocksCacheKey, Cache, CacheDesc, CacheKey, DataType, LLMRole
from llm_datadist.testing.cluster import Node, addrs_of, make_array

if TYPE_CHECKING:
    import random
    from collections.abc import Collection, Sequence

    from typing_extensions import Self

    from llm_datadist.testing.cluster import Bytes

PATTERN = 0xEE
FRAME = 4096
SECRET = json.dumps({"secret": "a secret of more than sixteen bytes"})
Shape = tuple[int, int, int]
SMALL: Shape = (2, 8, 512)
SHAPES: Sequence[Shape] = (SMALL, (4, 16, 4096), (4, 16, 1 << 16), (4, 16, 1 << 17))
#: request keys of an owner in two-sided mode: of rows in pool memory, and the last of a registered
KEYS = 4


@dataclass(frozen=True)
class Setting:
    """How both ends of a link are set up in one round."""

    path: str
    is_accessible: bool
    is_secure: bool
    timeout_ms: int
    shape: Shape

    @classmethod
    def draw(
        cls, rng: random.Random, timeouts_ms: Sequence[int], shapes: Sequence[Shape] = SHAPES
    ) -> Self:
        is_secure = rng.random() < 0.2
        return cls(
            rng.choice(("cma", "tcp")),
            rng.random() < 0.5,
            is_secure,
            rng.choice(timeouts_ms),
            rng.choice(shapes[:2] if is_secure else shapes),
        )

    def with_shape(self, shape: Shape) -> Setting:
        return replace(self, shape=shape)

    @property
    def timeout_s(self) -> float:
        return self.timeout_ms / 1000

    @property
    def row_shape(self) -> Shape:
        tensors, blocks, nbytes = self.shape
        return tensors, 1, blocks * nbytes

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "transfer_path": self.path,
            "enable_remote_cache_accessible": self.is_accessible,
            "sync_kv_timeout": self.timeout_ms,
        }
        if self.is_secure:
            options["link_security"] = SECRET
        return options

    @property
    def pool(self) -> str:
        tensors, _, nbytes = self.row_shape
        return json.dumps({"memory_size": KEYS * tensors * max(nbytes, 1 << 16), "page_shift": 12})


@dataclass(frozen=True)
class Place:
    """Where an owner is reached, and what is in its memory."""

    cluster_id: int
    port: int
    addrs: list[int]
    seed: int


class Framed:
    """A cache [tensors, blocks or rows, bytes] with a frame of the pattern around each tensor."""

    def __init__(
        self,
        node: Node,
        shape: Shape,
        seed: int | None = None,
        key: BlocksCacheKey | None = None,
        *,
        row_keys: Sequence[CacheKey] | None = None,
    ) -> None:
        tensors, blocks, nbytes = shape
        self.whole = np.full((tensors, FRAME + blocks * nbytes + FRAME), PATTERN, dtype=np.uint8)
        self.blocks = self.whole[:, FRAME:-FRAME].reshape(shape)
        assert np.shares_memory(self.whole, self.blocks)
        if seed is not None:
            self.blocks[:] = make_array(shape, seed)
        self.before = self.blocks.copy()
        desc = CacheDesc(tensors, [blocks, nbytes], DataType.DT_INT8)
        addrs, manager = addrs_of(self.blocks), node.manager
        if row_keys is None:
            self.cache = manager.register_blocks_cache(desc, addrs, key)
        else:
            self.cache = manager.register_cache(desc, addrs, row_keys)

    def damage(self, changed: Collection[int]) -> str:
        """What is wrong outside of the blocks that may have changed."""
        frames = (self.whole[:, :FRAME], self.whole[:, -FRAME:])
        if not all((frame == PATTERN).all() for frame in frames):
            return "bytes beside the tensors changed"
        kept = [block for block in range(self.blocks.shape[1]) if block not in set(changed)]
        if not np.array_equal(self.blocks[:, kept], self.before[:, kept]):
            return f"other blocks than {sorted(changed)} changed"
        return ""

    def wipe(self) -> None:
        self.whole[:] = PATTERN

    def give_back(self) -> None:
        """The memory is the caller's again, who writes to it, and looks at it later."""
        self.wipe()
        self.before = self.blocks
        if len(HELD.returned) < 8:
            HELD.returned.append(self)

    @property
    def is_wiped(self) -> bool:
        return bool((self.whole == PATTERN).all())


class Held:
    """What a process keeps between the calls of a case."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.own: Framed | None = None
        self.rows: list[Cache] = []
        self.row: Framed | None = None
        #: a destination of this process's own calls, or a source: given back after a failure
        self.returned: list[Framed] = []
        #: where a pull by request key puts its bytes
        self.row_in_flight: Bytes | None = None
        #: the doer in this process has its memory, and begins
        self.ready = threading.Event()


HELD = Held()


def start(node: Node, role: LLMRole, cluster_id: int, setting: Setting) -> None:
    """A cluster that does not listen and owns nothing."""
    HELD.clear()
    node.start(role, cluster_id, **setting.options)


def start_owner(node: Node, cluster_id: int, setting: Setting, seed: int, port: int = 0) -> Place:
    """A cluster that listens and owns a blocks cache, in two-sided mode also rows with keys."""
    HELD.clear()
    port = node.start(
        LLMRole.PROMPT,
        cluster_id,
        listen_ip_info=f"127.0.0.1:{port}",
        mem_pool_cfg=setting.pool,
        **setting.options,
    )
    return Place(cluster_id, port, own(node, setting, seed), seed)


def own(node: Node, setting: Setting, seed: int) -> list[int]:
    """The cache's addresses; its bytes are those of the seed, row r's those of the seed + 1 + r."""
    HELD.own = Framed(node, setting.shape, seed, BlocksCacheKey(0, 0))
    if not setting.is_accessible:
        tensors, _, nbytes = setting.row_shape
        desc = CacheDesc(tensors, [1, nbytes], DataType.DT_INT8)
        for request in range(KEYS - 1):
            cache = node.manager.allocate_cache(desc, [CacheKey(0, request)])
            row = make_array(setting.row_shape, seed + 1 + request)
            for addr, tensor in zip(cache.tensor_addrs, row, strict=True):
                ctypes.memmove(addr, int(tensor.ctypes.data), nbytes)
            HELD.rows.append(cache)
        key = CacheKey(0, KEYS - 1)
        HELD.row = Framed(node, setting.row_shape, seed + KEYS, row_keys=[key])
    return addrs_of(HELD.own.blocks)


def give_back(node: Node, changed: Collection[int]) -> tuple[str, Bytes]:
    """Frees all that `own` made and overwrites it: what was wrong with it, and what was there."""
    framed = HELD.own
    assert framed is not None
    node.manager.unregister_cache(framed.cache.cache_id)
    wrong, found = framed.damage(changed), framed.blocks.copy()
    framed.give_back()
    if HELD.row is not None:
        node.manager.unregister_cache(HELD.row.cache.cache_id)
        wrong = wrong or HELD.row.damage([])
    for request, cache in enumerate(HELD.rows):
        node.manager.deallocate_cache(cache)
        node.manager.remove_cache_key(CacheKey(0, request))
    used = [pool.used_nbytes for pools in node.datadist.pools().values() for pool in pools]
    if HELD.rows and any(used):
        wrong = wrong or f"{used} bytes of the pool are still taken"
    HELD.own = HELD.row = None
    HELD.rows = []
    return wrong, found


def late_bytes(node: Node) -> str:
    """Whether anything arrived in memory that was given back."""
    if all(framed.is_wiped for framed in HELD.returned):
        return ""
    return "bytes arrived after the memory had been given back"


def linked_ids(node: Node) -> list[int]:
    return sorted(link.cluster_id for link in node.datadist.links())
