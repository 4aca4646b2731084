"""The life of caches on one node, call by call, against a plain model. Spec 6.1-6.8.

The model keeps bytes and references in dictionaries; all that a program can see of the node is
compared: results, statuses, addresses that do not overlap, the bytes of every live cache.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Bytes, Node

if TYPE_CHECKING:
    from collections.abc import Callable

SUCCESS = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
GONE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NO_MEMORY = LLMStatusCode.LLM_OUT_OF_MEMORY
NO_ID = 2**64 - 1
PAGE = 1024
NUM_PAGES = 24
POOL = {"memory_size": NUM_PAGES * PAGE + 7, "page_shift": 10}

#: what a key is filed under: kind ("request", "prefix", "blocks"), id, model
Name = tuple[str, int, int]
#: tensors, rows, bytes of a row: from a part of a page to several pages, and more than the pool
Shape = tuple[int, int, int]

shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 100, 256, 700, 1024, 1500, 9000])
)
ids = st.integers(0, 3)
models = st.integers(0, 1)
keys = st.one_of(
    st.builds(lambda i, m: CacheKey(1, i, m), ids, models),
    st.builds(lambda i, m: CacheKey(1, NO_ID, m, i), ids, models),
    st.just(CacheKey(1, NO_ID)),
)
seeds = st.integers(0, 2**32 - 1)


def name_of(key: CacheKey) -> Name | None:
    if key.prefix_id != NO_ID:
        return "prefix", key.prefix_id, key.model_id
    return ("request", key.req_id, key.model_id) if key.req_id != NO_ID else None


@dataclass
class Life:
    """What the model knows of one cache."""

    shape: Shape
    is_owned: bool
    is_blocks: bool
    addrs: list[int]
    data: Bytes  #: [tensors, rows, bytes], as it must be
    keys: dict[Name, int] = field(default_factory=dict)
    has_id_reference: bool = True
    array: Bytes | None = None  #: of a registered cache: keeps the memory

    @property
    def tensor_nbytes(self) -> int:
        return self.shape[1] * self.shape[2]

    @property
    def num_pages(self) -> int:
        return self.shape[0] * -(-self.tensor_nbytes // PAGE)

    def memory(self) -> Bytes:
        tensors = [contents(addr, self.tensor_nbytes) for addr in self.addrs]
        return np.stack(tensors).reshape(self.shape)


def contents(addr: int, nbytes: int) -> Bytes:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(addr))


def random_bytes(shape: tuple[int, ...], seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def status_of(call: Callable[..., object], *args: Any) -> LLMStatusCode:
    try:
        call(*args)
    except LLMException as error:
        return error.status_code
    return SUCCESS


class CacheLives(RuleBasedStateMachine):
    """Caches come, are written, copied, and go."""

    caches = Bundle("caches")

    @initialize(is_accessible=st.booleans())
    def start(self, is_accessible: bool) -> None:
        self.node = Node()
        self.node.start(
            LLMRole.PROMPT,
            1,
            mem_pool_cfg=json.dumps(POOL),
            enable_remote_cache_accessible=is_accessible,
        )
        self.manager = self.node.manager
        self.lives: dict[int, Life] = {}
        self.bound: dict[Name, int] = {}
        self.last_id = 0

    # -- coming --

    @rule(
        target=caches,
        shape=shapes,
        row_keys=st.lists(keys, max_size=5),
        seed=seeds,
    )
    def allocate(self, shape: Shape, row_keys: list[CacheKey], seed: int) -> Any:
        bound = {name: row for row, key in enumerate(row_keys) if (name := name_of(key))}
        is_refused = len(row_keys) > shape[1] or any(name in self.bound for name in bound)
        return self._allocate(shape, bound, seed, is_refused, row_keys)

    @rule(target=caches, shape=shapes, model=st.none() | models, seed=seeds)
    def allocate_blocks(self, shape: Shape, model: int | None, seed: int) -> Any:
        bound: dict[Name, int] = {} if model is None else {("blocks", 0, model): 0}
        is_refused = any(name in self.bound for name in bound)
        return self._allocate(shape, bound, seed, is_refused, model, is_blocks=True)

    @rule(target=caches, shape=shapes, row_keys=st.lists(keys, max_size=5), seed=seeds)
    def register(self, shape: Shape, row_keys: list[CacheKey], seed: int) -> Cache:
        array = random_bytes(shape, seed)
        cache = self.manager.register_cache(
            _desc(shape), [int(tensor.ctypes.data) for tensor in array], row_keys
        )
        bound = {}
        for row, key in enumerate(row_keys):
            name = name_of(key)
            if name and name not in self.bound and name not in bound:  # the first binding stays
                bound[name] = row
        self._add(cache, shape, bound, array=array)
        return cache

    @rule(target=caches, shape=shapes, model=st.none() | models, seed=seeds)
    def register_blocks(self, shape: Shape, model: int | None, seed: int) -> Cache:
        array = random_bytes(shape, seed)
        key = None if model is None else BlocksCacheKey(1, model)
        addrs = [int(tensor.ctypes.data) for tensor in array]
        cache = self.manager.register_blocks_cache(_desc(shape), addrs, key)
        bound: dict[Name, int] = {} if model is None else {("blocks", 0, model): 0}
        for name in bound:
            if name in self.bound:  # it moves
                del self.lives[self.bound[name]].keys[name]
        self._add(cache, shape, bound, array=array, is_blocks=True)
        return cache

    # -- going --

    @rule(cache=caches)
    def deallocate(self, cache: Cache) -> None:
        life = self.lives.get(cache.cache_id)
        if cache.is_blocks_cache:
            assert status_of(self.manager.deallocate_cache, cache) is INVALID
            self.manager.deallocate_blocks_cache(cache)
        else:
            assert status_of(self.manager.deallocate_blocks_cache, cache) is INVALID
            self.manager.deallocate_cache(cache)
        assert cache.tensor_addrs == []
        if life is not None and life.is_owned:
            life.has_id_reference = False
            if life.is_blocks or not life.keys:
                self._free(cache.cache_id)

    @rule(cache=caches)
    def unregister(self, cache: Cache) -> None:
        self.manager.unregister_cache(cache.cache_id)
        life = self.lives.get(cache.cache_id)
        if life is not None and not life.is_owned:  # an allocated one stays
            self._free(cache.cache_id)

    @rule(cache=consumes(caches))
    def forget(self, cache: Cache) -> None:
        """The program drops the object; the cache goes on."""

    @rule(key=keys)
    def remove_key(self, key: CacheKey) -> None:
        self.manager.remove_cache_key(key)
        name = name_of(key)
        cache_id = self.bound.get(name) if name else None
        if name is None or cache_id is None or not self.lives[cache_id].is_owned:
            return
        del self.bound[name]
        life = self.lives[cache_id]
        del life.keys[name]
        if not life.has_id_reference and not life.keys:
            self._free(cache_id)

    # -- bytes --

    @rule(cache=caches, seed=seeds)
    def write(self, cache: Cache, seed: int) -> None:
        life = self.lives.get(cache.cache_id)
        if life is not None:
            self._write(life, seed)

    @rule(
        dst=caches,
        src=caches,
        dst_row=st.integers(0, 3),
        src_row=st.integers(0, 3),
        offset=st.sampled_from([0, 0, 1, 50, 99, 256]),
        size=st.sampled_from([-1, -1, 0, 1, 100, 256, 1000]),
    )
    def copy_cache(
        self, dst: Cache, src: Cache, dst_row: int, src_row: int, offset: int, size: int
    ) -> None:
        status = status_of(self.manager.copy_cache, dst, src, dst_row, src_row, offset, size)
        source, target = self.lives.get(src.cache_id), self.lives.get(dst.cache_id)
        if dst.is_blocks_cache or src.is_blocks_cache or size == 0:
            assert status is INVALID
        elif source is None or target is None:
            assert status is GONE
        else:
            end = source.shape[2] if size == -1 else offset + size
            fits = (
                source.shape[0] == target.shape[0]
                and src_row < source.shape[1]
                and dst_row < target.shape[1]
                and offset < end <= min(source.shape[2], target.shape[2])
            )
            assert status is (SUCCESS if fits else INVALID)
            if fits:
                part = source.data[:, src_row, offset:end]
                target.data[:, dst_row, offset:end] = part.copy()

    @rule(
        cache=caches,
        src=st.integers(-1, 4),
        dst=st.lists(st.integers(-1, 4), max_size=3),
    )
    def copy_blocks(self, cache: Cache, src: int, dst: list[int]) -> None:
        if cache.is_blocks_cache and dst and min(src, *dst) < 0:
            with pytest.raises(TypeError):
                self.manager.copy_blocks(cache, {src: dst})
            return
        status = status_of(self.manager.copy_blocks, cache, {src: dst})
        life = self.lives.get(cache.cache_id)
        if not cache.is_blocks_cache:
            assert status is INVALID
        elif not dst:
            assert status is SUCCESS
        elif life is None:
            assert status is GONE
        elif not all(0 <= block < life.shape[1] for block in [src, *dst]):
            assert status is INVALID
        else:
            assert status is SUCCESS
            life.data[:, dst] = life.data[:, [src]]

    # -- what always holds --

    @invariant()
    def every_live_cache_has_its_bytes(self) -> None:
        for cache_id, life in getattr(self, "lives", {}).items():
            assert np.array_equal(life.memory(), life.data), f"cache {cache_id}"

    @invariant()
    def no_two_caches_overlap(self) -> None:
        spans = sorted(
            (addr, addr + life.tensor_nbytes)
            for life in getattr(self, "lives", {}).values()
            for addr in life.addrs
        )
        assert all(before[1] <= behind[0] for before, behind in pairwise(spans))

    def teardown(self) -> None:
        if not hasattr(self, "node"):
            return
        try:
            self._everything_freed_gives_back_the_whole_pool()
        finally:
            self.node.stop()

    def _everything_freed_gives_back_the_whole_pool(self) -> None:
        for cache_id in list(self.lives):
            life = self.lives[cache_id]
            if life.has_id_reference and life.is_owned:
                handle = Cache(
                    cache_id, _desc(life.shape), life.addrs, self.manager, False, life.is_blocks
                )
                self.deallocate(handle)
            for kind, number, model in list(life.keys):
                if kind != "blocks":
                    request, prefix = (number, NO_ID) if kind == "request" else (NO_ID, number)
                    self.remove_key(CacheKey(1, request, model, prefix))
        assert not any(life.is_owned for life in self.lives.values())
        self.every_live_cache_has_its_bytes()
        whole = CacheDesc(1, [NUM_PAGES, PAGE], DataType.DT_UINT8)
        cache = self.manager.allocate_cache(whole)
        assert status_of(self.manager.allocate_cache, _desc((1, 1, 1))) is NO_MEMORY
        self.manager.deallocate_cache(cache)

    # -- parts of the above --

    def _allocate(
        self,
        shape: Shape,
        bound: dict[Name, int],
        seed: int,
        is_refused: bool,
        given: Any,
        *,
        is_blocks: bool = False,
    ) -> Any:
        life = Life(shape, True, is_blocks, [], np.empty(shape, dtype=np.uint8), bound)
        cache: Cache | None
        try:
            if is_blocks:
                key = None if given is None else BlocksCacheKey(1, given)
                cache = self.manager.allocate_blocks_cache(_desc(shape), key)
            else:
                cache = self.manager.allocate_cache(_desc(shape), given)
        except LLMException as error:
            status = error.status_code
            cache = None
        if cache is None:
            assert status is NO_MEMORY or (status is INVALID and is_refused)
            assert status is INVALID or not self._surely_has_room(life)
            return multiple()
        assert not is_refused
        life.addrs = list(cache.tensor_addrs)
        assert len(life.addrs) == shape[0]
        assert self._used_pages() + life.num_pages <= NUM_PAGES
        self._add(cache, shape, bound, is_blocks=is_blocks)
        self._write(self.lives[cache.cache_id], seed)
        return cache

    def _surely_has_room(self, wanted: Life) -> bool:
        """Whether even the worst placement of what is allocated leaves room for every tensor."""
        pages = -(-wanted.tensor_nbytes // PAGE)
        used = self._used_pages()
        spans = sum(life.shape[0] for life in self.lives.values() if life.is_owned)
        # n spans part the free pages into n + 1 at most, each of which may waste pages - 1
        wasted = (spans + 1) * (pages - 1)
        return NUM_PAGES - used - wasted >= wanted.num_pages

    def _used_pages(self) -> int:
        return sum(life.num_pages for life in self.lives.values() if life.is_owned)

    def _add(
        self,
        cache: Cache,
        shape: Shape,
        bound: dict[Name, int],
        *,
        array: Bytes | None = None,
        is_blocks: bool = False,
    ) -> None:
        assert cache.cache_id > self.last_id
        assert cache.is_blocks_cache is is_blocks
        self.last_id = cache.cache_id
        data = np.empty(shape, dtype=np.uint8) if array is None else array.copy()
        addrs = list(cache.tensor_addrs)
        self.lives[cache.cache_id] = Life(
            shape, array is None, is_blocks, addrs, data, dict(bound), array=array
        )
        self.bound.update(dict.fromkeys(bound, cache.cache_id))

    def _write(self, life: Life, seed: int) -> None:
        life.data = random_bytes(life.shape, seed)
        for addr, tensor in zip(life.addrs, life.data, strict=True):
            contents(addr, life.tensor_nbytes)[:] = tensor.ravel()

    def _free(self, cache_id: int) -> None:
        life = self.lives.pop(cache_id)
        for name in life.keys:
            del self.bound[name]


def _desc(shape: Shape) -> CacheDesc:
    return CacheDesc(shape[0], list(shape[1:]), DataType.DT_UINT8)


TestCacheLives = pytest.mark.shows(
    "keys.references", "keys.first_registered_wins", "keys.blocks_overwrite", "O19"
)(CacheLives.TestCase)
TestCacheLives.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
