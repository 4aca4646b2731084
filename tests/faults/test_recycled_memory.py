"""Memory that its owner registers anew, as another cache, while peers pull: never mixed bytes."""

from __future__ import annotations

import ctypes
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Node, NodeProcess, addrs_of

SUCCESS = LLMStatusCode.LLM_SUCCESS
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST

#: large enough to be sent in parts by several threads, and to be met in its middle
SHAPE = (4, 16, 1 << 16)
GENERATIONS = 80
#: what a test with so many generations may take
BUDGET_S = 15.0

Words = npt.NDArray[np.uint64]


def renew_for_ever(node: Node, generations: int) -> int:
    """Registers the same memory as one cache after the other; cache n holds nothing but words n.

    The owner's side of the bargain: unregister, then overwrite, then register.
    """
    blocks, rows = (np.zeros(SHAPE, dtype=np.uint8) for _ in range(2))
    desc = CacheDesc(SHAPE[0], [*SHAPE[1:]], DataType.DT_INT8)
    cache_id = 0
    for _ in range(generations):
        for cache_id_before in (cache_id - 1, cache_id):
            node.manager.unregister_cache(cache_id_before)
        blocks.view(np.uint64)[:] = cache_id + 1
        rows.view(np.uint64)[:] = cache_id + 2
        node.manager.register_blocks_cache(desc, addrs_of(blocks), BlocksCacheKey(0, 0))
        cache_id = node.manager.register_cache(desc, addrs_of(rows), [CacheKey(1, 5)]).cache_id
    node.arrays.update({0: blocks, 1: rows})  # what peers pull now is kept
    return cache_id


class Puller:
    """A thread's memory to pull into, and what it saw."""

    def __init__(self, node: Node) -> None:
        self._manager = node.manager
        self._blocks = node.blocks_cache(*SHAPE)
        self._rows = node.rows_cache(SHAPE[0], 1, SHAPE[2])
        self._blocks_words: Words = node.arrays[self._blocks.cache_id].view(np.uint64)
        self._rows_words: Words = node.arrays[self._rows.cache_id].view(np.uint64)
        #: pulls that succeeded, by key and by id, and those that were told that the cache is gone
        self.by_key = self.by_id = self.gone = 0

    def pull_blocks(self) -> int:
        """By key: the cache that all bytes are of, or 0 when it was gone."""
        every = list(range(SHAPE[1]))
        try:
            self._manager.pull_blocks(BlocksCacheKey(1, 0), self._blocks, every, every)
        except LLMException as error:
            return self._gone(error)
        self.by_key += 1
        return the_only_word(self._blocks_words)

    def pull_row(self, cache_id: int) -> None:
        """By id: only the bytes of that very cache will do."""
        try:
            self._manager.pull_cache(CacheKeyByIdAndIndex(1, cache_id, 3), self._rows)
        except LLMException as error:
            self._gone(error)
        else:
            self.by_id += 1
            assert the_only_word(self._rows_words) == cache_id

    def _gone(self, error: LLMException) -> int:
        assert error.status_code == NOT_EXIST, error
        self.gone += 1
        return 0


def the_only_word(words: Words) -> int:
    low, high = int(words.min()), int(words.max())
    assert low == high, f"bytes of caches {low} to {high} are mixed"
    return low


@pytest.fixture
def owner(node: Node, victim: NodeProcess, is_accessible: bool, path: str) -> NodeProcess:
    settings: dict[str, Any] = {
        "enable_remote_cache_accessible": is_accessible,
        "transfer_path": path,
        "sync_kv_timeout": 5000,
    }
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) == SUCCESS
    return victim


@pytest.mark.shows("generations")
def test_each_pull_is_all_of_one_cache_or_says_that_it_is_gone(
    node: Node, owner: NodeProcess
) -> None:
    pullers = [Puller(node) for _ in range(3)]
    ended = threading.Event()

    def pull_until_ended(puller: Puller) -> None:
        while not ended.is_set():
            blocks_id = puller.pull_blocks()
            puller.pull_row(blocks_id + 1 if blocks_id else 2)

    begun = time.monotonic()
    owner.begin(renew_for_ever, GENERATIONS)
    with ThreadPoolExecutor(len(pullers)) as pool:
        calls = [pool.submit(pull_until_ended, puller) for puller in pullers]
        try:
            last_id = owner.result(BUDGET_S)
        finally:
            ended.set()
        for call in calls:
            call.result()
    assert time.monotonic() - begun <= BUDGET_S
    assert last_id == 2 * GENERATIONS
    assert sum(puller.by_key for puller in pullers) > 0
    assert sum(puller.gone for puller in pullers) > 0
    last = Puller(node)
    assert last.pull_blocks() == last_id - 1, "the last cache stays"
    last.pull_row(last_id)
    assert last.by_id == 1


@pytest.mark.shows("generations")
def test_a_key_that_moves_names_the_old_cache_or_the_new_one(
    node: Node, owner: NodeProcess
) -> None:
    """Two memories take turns under one key, and the old one is overwritten only when it is out."""
    puller = Puller(node)
    owner.begin(take_turns, GENERATIONS)
    seen = [puller.pull_blocks() for _ in range(50)]
    assert owner.result(BUDGET_S) == GENERATIONS
    assert sorted(filter(None, seen)) == list(filter(None, seen)), "never back to an older one"
    assert puller.pull_blocks() == GENERATIONS


def take_turns(node: Node, generations: int) -> int:
    desc = CacheDesc(SHAPE[0], [*SHAPE[1:]], DataType.DT_INT8)
    memories = [np.zeros(SHAPE, dtype=np.uint8) for _ in range(2)]
    cache_id = 0
    for generation in range(1, generations + 1):
        memory = memories[generation % 2]
        memory.view(np.uint64)[:] = generation
        before = cache_id
        key = BlocksCacheKey(0, 0)
        cache_id = node.manager.register_blocks_cache(desc, addrs_of(memory), key).cache_id
        node.manager.unregister_cache(before)
    node.arrays.update(enumerate(memories))
    return cache_id


POOL_NBYTES = 1 << 20
#: half of the pool
ALLOCATED = (2, 8, POOL_NBYTES // 32)


@pytest.mark.shows("generations")
def test_what_named_freed_memory_never_reaches_who_has_it_now(
    node: Node, victim: NodeProcess, is_accessible: bool, path: str
) -> None:
    """By key and by id, all of which were used before."""
    settings: dict[str, Any] = {
        "enable_remote_cache_accessible": is_accessible,
        "transfer_path": path,
    }
    pool = json.dumps({"memory_size": POOL_NBYTES, "page_shift": 16})
    port = victim.call(
        Node.start,
        LLMRole.PROMPT,
        1,
        listen_ip_info="127.0.0.1:0",
        mem_pool_cfg=pool,
        **settings,
    )
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) == SUCCESS
    blocks, rows = node.blocks_cache(*ALLOCATED), node.rows_cache(*ALLOCATED)
    arrays = [node.arrays[blocks.cache_id][:, 0], node.arrays[rows.cache_id][:, 0]]

    def pull_blocks(generation: int) -> None:
        node.manager.pull_blocks(BlocksCacheKey(1, generation), blocks, [7], [0])

    def pull_row(generation: int) -> None:
        node.manager.pull_cache(CacheKeyByIdAndIndex(1, 2 * generation, 7), rows)

    for generation in range(1, 6):
        victim.call(allocate_anew, generation)
        for array, pull in zip(arrays, (pull_blocks, pull_row), strict=True):
            pull(generation)
            assert (array == generation).all()
            for old in range(1, generation):
                with pytest.raises(LLMException) as error:
                    pull(old)
                assert error.value.status_code == NOT_EXIST
            assert (array == generation).all()


def allocate_anew(node: Node, generation: int) -> None:
    """Frees what there is, and fills all of the pool with two caches of one byte."""
    manager, desc = node.manager, CacheDesc(ALLOCATED[0], [*ALLOCATED[1:]], DataType.DT_INT8)
    for cache in node.caches.values():
        free = (
            manager.deallocate_blocks_cache if cache.is_blocks_cache else manager.deallocate_cache
        )
        free(cache)
    blocks = manager.allocate_blocks_cache(desc, BlocksCacheKey(1, generation))
    rows = manager.allocate_cache(desc)
    assert [blocks.cache_id, rows.cache_id] == [2 * generation - 1, 2 * generation]
    for addr in [*blocks.tensor_addrs, *rows.tensor_addrs]:
        ctypes.memset(addr, generation, ALLOCATED[1] * ALLOCATED[2])
    node.caches = {0: blocks, 1: rows}
