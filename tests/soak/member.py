"""One of the threads of `medley`."""

from __future__ import annotations

import ctypes
import random
import time
import traceback
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMException,
    LLMStatusCode,
    Placement,
    TransferWithCacheKeyConfig,
)
from llm_datadist.testing.cluster import Bytes, Node, cluster_info, make_array
from soak.medley_peer import (
    BLOCKS,
    MINE,
    MOVING,
    NOT_LINKED,
    OFFERED,
    ROWS,
    ROWS_ID,
    SUCCESS,
    TARGET,
    TARGET_ROWS_ID,
    TIMEOUT,
    Notes,
)

if TYPE_CHECKING:
    from llm_datadist import Cache


#: followed by another call: a pull, or a link
TWICE = ("push_blocks", "push_cache", "transfer", "unlink")


class AtOnce(LayerSynchronizer):
    """Every layer is computed."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


class Member:
    """A thread with memory of its own; what it pushes to has no other writer."""

    #: how often, and which statuses it may have
    OPERATIONS: dict[str, tuple[int, set[LLMStatusCode]]] = {  # noqa: RUF012
        "pull_blocks": (12, MOVING),
        "pull_cache": (8, MOVING),
        "push_blocks": (8, MOVING),
        "push_cache": (8, MOVING),
        "transfer": (6, MOVING),
        "copy": (6, {SUCCESS}),
        "swap": (6, {SUCCESS}),
        "register": (6, MOVING),
        "allocate": (6, MOVING | {LLMStatusCode.LLM_OUT_OF_MEMORY}),
        # not linked, or failed: another thread unlinked it at once, or while it was being made
        "link": (
            2,
            {
                SUCCESS,
                LLMStatusCode.LLM_ALREADY_LINK,
                NOT_LINKED,
                LLMStatusCode.LLM_FAILED,
                TIMEOUT,
            },
        ),
        "unlink": (1, {SUCCESS, TIMEOUT}),
        "query": (4, {SUCCESS}),
    }

    def __init__(
        self, node: Node, notes: Notes, ports: list[int], index: int, seed: int, sync_s: float
    ) -> None:
        self._node, self._notes, self._ports, self._index = node, notes, ports, index
        self._sync_s = sync_s
        self._rng = random.Random(seed * 1000 + index)
        self._offered = {peer: make_array(BLOCKS, peer) for peer in (1, 2)}
        self._rows = {peer: make_array(ROWS, 100 + peer) for peer in (1, 2)}
        self._cache = node.blocks_cache(*MINE)
        self._back = node.blocks_cache(*MINE)
        self._row = node.rows_cache(ROWS[0], 2, ROWS[2])
        self._host = node.blocks_cache(*MINE, placement=Placement.HOST)

    def run(self, end: float) -> None:
        names = list(self.OPERATIONS)
        weights = [weight for weight, _ in self.OPERATIONS.values()]
        while time.monotonic() < end:
            name = self._rng.choices(names, weights)[0]
            peer = self._rng.choice((1, 2))
            begun = time.monotonic()
            text = ""
            try:
                status: LLMStatusCode = getattr(self, name)(peer)
            except LLMException as error:
                status, text = error.status_code, str(error)
            except Exception:
                self._notes.complain(f"{name}: {traceback.format_exc()}")
                return
            limit_s = self._sync_s * (2 if name in TWICE else 1)
            took = time.monotonic() - begun
            self._notes.add(name, status, took - limit_s)
            if took > 1.2 * limit_s + 0.1:
                self._notes.complain(f"{name} took {took:.3f} s of {limit_s} s")
            if status not in self.OPERATIONS[name][1]:
                self._notes.complain(f"{name} of cluster {peer}: {status} {text}")

    def pull_blocks(self, peer: int) -> LLMStatusCode:
        self._pull_offered(peer, self._cache, self._array(self._cache))
        return SUCCESS

    def pull_cache(self, peer: int) -> LLMStatusCode:
        row, array = self._rng.randrange(ROWS[1]), self._array(self._row)
        array[:] = 0
        key = CacheKeyByIdAndIndex(peer, ROWS_ID, row)
        self._node.manager.pull_cache(key, self._row, 1)
        self._check("pull_cache", array[:, 1], self._rows[peer][:, row])
        self._check("beside pull_cache", array[:, 0], np.zeros_like(array[:, 0]))
        return SUCCESS

    def push_blocks(self, peer: int) -> LLMStatusCode:
        src, array = self._refill()
        self._node.manager.push_blocks(
            BlocksCacheKey(peer, TARGET), self._cache, src, self._target()
        )
        return self._pull_back("push_blocks", peer, array[:, src])

    def transfer(self, peer: int) -> LLMStatusCode:
        src, array = self._refill()
        config = TransferWithCacheKeyConfig(BlocksCacheKey(peer, TARGET), range(2), range(2))
        task = self._node.manager.transfer_cache_async(
            self._cache, AtOnce(), [config], src, self._target()
        )
        status = task.synchronize(int(2 * self._sync_s * 1000))
        if status is not SUCCESS:
            return status
        return self._pull_back("transfer", peer, array[:, src])

    def push_cache(self, peer: int) -> LLMStatusCode:
        array = self._array(self._row)
        array[:] = self._noise(array.shape)
        sent = array[:, 0].copy()
        key = CacheKeyByIdAndIndex(peer, TARGET_ROWS_ID, self._index)
        self._node.manager.push_cache(key, self._row, 0)
        self._node.manager.pull_cache(key, self._row, 1)
        self._check("push_cache", array[:, 1], sent)
        return SUCCESS

    def copy(self, peer: int) -> LLMStatusCode:
        (a, b, *_), array = self._refill()
        expected = array.copy()
        expected[:, b] = expected[:, a]
        self._node.manager.copy_blocks(self._cache, {a: [b]})
        self._check("copy_blocks", array, expected)
        rows = self._array(self._row)
        rows[:] = self._noise(rows.shape)
        self._node.manager.copy_cache(self._row, self._row, 1, 0)
        self._check("copy_cache", rows[:, 1], rows[:, 0])
        return SUCCESS

    def swap(self, peer: int) -> LLMStatusCode:
        (a, b, *_), array = self._refill()
        host = self._array(self._host)
        self._node.manager.swap_blocks(self._cache, self._host, {a: b})
        self._check("swap out", host[:, b], array[:, a])
        self._node.manager.swap_blocks(self._host, self._cache, {b: b})
        self._check("swap in", array[:, b], host[:, b])
        return SUCCESS

    def register(self, peer: int) -> LLMStatusCode:
        array = np.zeros(MINE, np.uint8)
        desc = CacheDesc(MINE[0], list(MINE[1:]), DataType.DT_INT8)
        addrs = [int(tensor.ctypes.data) for tensor in array]
        manager = self._node.manager
        key = BlocksCacheKey(0, 1000 + self._rng.randrange(8))
        cache = manager.register_blocks_cache(desc, addrs, key)
        try:
            self._pull_offered(peer, cache, array)
        finally:
            manager.unregister_cache(cache.cache_id)
        return SUCCESS

    def allocate(self, peer: int) -> LLMStatusCode:
        manager = self._node.manager
        placement = self._rng.choice((Placement.DEVICE, Placement.HOST))
        num_blocks = self._rng.choice((8, 8, 64, 512))
        desc = CacheDesc(MINE[0], [num_blocks, MINE[2]], DataType.DT_INT8, placement)
        key = CacheKey(0, 1000 + self._index)
        rows = manager.allocate_cache(desc, [key])
        manager.deallocate_cache(rows)  # its key still holds it
        try:
            cache = manager.allocate_blocks_cache(desc)
        finally:
            manager.remove_cache_key(key)
        try:
            nbytes = desc.size
            tensors = [
                np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(addr))
                for addr in cache.tensor_addrs
            ]
            for tensor in tensors:
                tensor[:] = self._index
            if placement is Placement.DEVICE:
                src, dst = self._choose(BLOCKS[1], 4), self._choose(num_blocks, 4)
                manager.pull_blocks(BlocksCacheKey(peer, OFFERED), cache, src, dst)
                expected = np.full((MINE[0], num_blocks, MINE[2]), self._index, np.uint8)
                expected[:, dst] = self._offered[peer][:, src]
                got = np.stack(tensors).reshape(expected.shape)
                self._check("pull into allocated memory", got, expected)
        finally:
            manager.deallocate_blocks_cache(cache)
        return SUCCESS

    def link(self, peer: int) -> LLMStatusCode:
        return self._node.link(self._ports[peer - 1], peer, 5000)

    def unlink(self, peer: int) -> LLMStatusCode:
        info = cluster_info(self._ports[peer - 1], peer)
        force = self._rng.random() < 0.5
        status = self._node.datadist.unlink_clusters([info], 5000, force)[1][0]
        self._notes.add("link again", self.link(peer), float("-inf"))
        return status

    def query(self, peer: int) -> LLMStatusCode:
        links = self._node.datadist.links()
        paths = {1: "tcp", 2: "cma"}
        if any(link.path != paths[link.cluster_id] for link in links):
            self._notes.complain(f"links: {links}")
        for usage in (u for each in self._node.datadist.pools().values() for u in each):
            if usage.free_nbytes + usage.used_nbytes != usage.capacity_nbytes:
                self._notes.complain(f"pools: {usage}")
        return SUCCESS

    # -- parts of the above --

    def _array(self, cache: Cache) -> Bytes:
        return self._node.arrays[cache.cache_id]

    def _noise(self, shape: tuple[int, ...]) -> Bytes:
        return make_array(shape, self._rng.getrandbits(32))

    def _choose(self, of: int, count: int) -> list[int]:
        return self._rng.sample(range(of), count)

    def _target(self) -> list[int]:
        return [2 * self._index, 2 * self._index + 1]

    def _refill(self) -> tuple[list[int], Bytes]:
        """New bytes in the cache, and two blocks of it."""
        array = self._array(self._cache)
        array[:] = self._noise(array.shape)
        return self._choose(MINE[1], 2), array

    def _pull_offered(self, peer: int, cache: Cache, array: Bytes) -> None:
        src, dst = self._choose(BLOCKS[1], 4), self._choose(MINE[1], 4)
        array[:] = 0
        self._node.manager.pull_blocks(BlocksCacheKey(peer, OFFERED), cache, src, dst)
        expected = np.zeros_like(array)
        expected[:, dst] = self._offered[peer][:, src]
        self._check("pull_blocks", array, expected)

    def _pull_back(self, what: str, peer: int, sent: Bytes) -> LLMStatusCode:
        self._node.manager.pull_blocks(
            BlocksCacheKey(peer, TARGET), self._back, self._target(), [0, 1]
        )
        self._check(what, self._array(self._back)[:, :2], sent)
        return SUCCESS

    def _check(self, what: str, got: Bytes, expected: Bytes) -> None:
        if not np.array_equal(got, expected):
            self._notes.complain(f"{what} succeeded with {(got != expected).sum()} wrong bytes")
