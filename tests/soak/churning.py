"""The owner's part of churn: three memories and a pool that hold one cache after the other.

All words of a cache are its id; what peers push by id, or by key, says so.
"""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llm_datadist import BlocksCacheKey, Cache, CacheDesc, CacheKey, DataType
from llm_datadist.testing.cluster import addrs_of
from soak.ends import FRAME, PATTERN, give_back

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.testing.cluster import Bytes, Node
    from soak.ends import Setting, Shape

Words = npt.NDArray[np.uint64]
#: keys that move from one registered cache to the next; allocated caches have keys of their own
NUM_KEYS = 3
NUM_MEMORIES = 3
OWN_KEYS = 1000
#: set in words that were pushed: with the id of the cache that was meant, or with its key
BY_ID, BY_KEY = 1 << 62, 1 << 63


@dataclass
class Known:
    """What is there between two series of changes."""

    by_key: dict[int, int] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    #: request keys of allocated rows
    requests: dict[int, int] = field(default_factory=dict)
    #: the key that each blocks cache was given
    keys_of: dict[int, int | None] = field(default_factory=dict)
    wrong: str = ""


class Memory:
    """Memory in a frame that is one cache after the other."""

    def __init__(self, shape: Shape) -> None:
        tensors, blocks, nbytes = shape
        self.whole = np.full((tensors, FRAME + blocks * nbytes + FRAME), PATTERN, dtype=np.uint8)
        self.bytes = self.whole[:, FRAME:-FRAME].reshape(shape)
        self.cache: Cache | None = None
        self.key: int | None = None

    @property
    def is_framed(self) -> bool:
        frames = self.whole[:, :FRAME], self.whole[:, -FRAME:]
        return all(bool((frame == PATTERN).all()) for frame in frames)


class Memories:
    """All that the owner has."""

    def __init__(self, node: Node, setting: Setting) -> None:
        tensors, *rest = setting.shape
        self._manager = node.manager
        self._desc = CacheDesc(tensors, rest, DataType.DT_INT8)
        self._memories = [Memory(setting.shape) for _ in range(NUM_MEMORIES)]
        self._allocated: Cache | None = None
        self._by_key: dict[int, int] = {}
        self._keys_of: dict[int, int | None] = {}
        self._wrong = ""
        #: ids count up: what is filled before it is registered says already what it will be
        self._last_id = self._register(self._memories[0], None, is_blocks=True).cache_id
        self._manager.unregister_cache(self._last_id)

    def known(self) -> Known:
        rows = [m.cache.cache_id for m in self._memories if m.cache and not m.cache.is_blocks_cache]
        requests = {}
        if self._allocated is not None and not self._allocated.is_blocks_cache:
            cache_id = self._allocated.cache_id
            rows.append(cache_id)
            requests[OWN_KEYS + cache_id] = cache_id
        keys_of, self._keys_of = self._keys_of, {}
        return Known(dict(self._by_key), rows, requests, keys_of, self._wrong)

    def change(self, rng: random.Random) -> None:
        if rng.random() < 0.3:
            self.reallocate(rng)
        else:
            self.renew(rng.choice(self._memories), rng)

    def begin(self, rng: random.Random) -> None:
        for memory in self._memories:
            self.renew(memory, rng)
        self.reallocate(rng)

    def renew(self, memory: Memory, rng: random.Random) -> None:
        """Forgets a registered cache, and makes its memory another."""
        before = memory.cache
        if before is not None:
            self._manager.unregister_cache(before.cache_id)
            self._forget(before.cache_id)
            self._check([words_of(memory.bytes)], before.cache_id, memory.key)
            self._wrong = self._wrong or ("" if memory.is_framed else "a frame was written to")
        cache_id, is_blocks = self._next_id(), rng.random() < 0.6
        memory.key = rng.choice((None, *range(NUM_KEYS))) if is_blocks else None
        words_of(memory.bytes)[:] = cache_id
        memory.cache = self._register(memory, memory.key, is_blocks=is_blocks)
        assert memory.cache.cache_id == cache_id
        if is_blocks:
            self._name(cache_id, memory.key)

    def reallocate(self, rng: random.Random) -> None:
        """Frees the allocated cache, and allocates another."""
        before, manager = self._allocated, self._manager
        if before is not None:
            own_key = OWN_KEYS + before.cache_id
            self._check(_words_at(before), before.cache_id, own_key)
            self._forget(before.cache_id)
            if before.is_blocks_cache:
                manager.deallocate_blocks_cache(before)
            else:
                manager.deallocate_cache(before)
                manager.remove_cache_key(CacheKey(0, own_key))
        cache_id = self._next_id()
        own_key = OWN_KEYS + cache_id
        if rng.random() < 0.5:
            cache = manager.allocate_blocks_cache(self._desc, BlocksCacheKey(0, own_key))
            self._name(cache_id, own_key)
        else:
            cache = manager.allocate_cache(self._desc, [CacheKey(0, own_key)])
        assert cache.cache_id == cache_id
        for words in _words_at(cache):
            words[:] = cache_id
        self._allocated = cache

    def _register(self, memory: Memory, key: int | None, *, is_blocks: bool) -> Cache:
        addrs = addrs_of(memory.bytes)
        if not is_blocks:
            return self._manager.register_cache(self._desc, addrs)
        name = None if key is None else BlocksCacheKey(0, key)
        return self._manager.register_blocks_cache(self._desc, addrs, name)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _name(self, cache_id: int, key: int | None) -> None:
        self._keys_of[cache_id] = key
        if key is not None:
            self._by_key[key] = cache_id

    def _forget(self, cache_id: int) -> None:
        self._by_key = {key: of for key, of in self._by_key.items() if of != cache_id}

    def _check(self, words: Sequence[Words], cache_id: int, key: int | None) -> None:
        """Nobody wrote here who did not mean this cache."""
        allowed = [cache_id, BY_ID | cache_id] + ([] if key is None else [BY_KEY | key])
        found = np.unique(np.concatenate([np.unique(each) for each in words]))
        strange = [
            word
            for word in map(int, np.setdiff1d(found, np.array(allowed, dtype=np.uint64)))
            # a push to an allocated cache may be half way through a word while it is looked at
            if not any(is_torn(word, new, old) for new in allowed for old in allowed)
        ]
        if strange and not self._wrong:
            self._wrong = f"cache {cache_id} has the words {[hex(word) for word in strange[:4]]}"


def is_torn(word: int, pushed: int, owner: int) -> bool:
    """Whether the word's bytes are partly what was pushed and partly what was there before."""
    each = zip(*(value.to_bytes(8, "little") for value in (word, pushed, owner)), strict=True)
    return word != owner and all(byte in (new, old) for byte, new, old in each)


def _words_at(cache: Cache) -> list[Words]:
    """The memory of an allocated cache."""
    nbytes = cache.cache_desc.size
    return [
        np.ctypeslib.as_array((ctypes.c_uint64 * (nbytes // 8)).from_address(addr))
        for addr in cache.tensor_addrs
    ]


_MEMORIES: dict[str, Memories] = {}


def open_memories(node: Node, setting: Setting, seed: int) -> Known:
    """Begins, with nothing but these memories and the pool."""
    wrong, _ = give_back(node, [])
    assert not wrong, wrong
    memories = _MEMORIES["of this process"] = Memories(node, setting)
    memories.begin(random.Random(seed))
    return memories.known()


def change(node: Node, seed: int, count: int) -> Known:
    """So many changes, one after the other; what there is then."""
    rng, memories = random.Random(seed), _MEMORIES["of this process"]
    for _ in range(count):
        memories.change(rng)
    return memories.known()


def words_of(memory: Bytes) -> Words:
    """The words of memory, whatever its shape."""
    return memory.view(np.uint64)
