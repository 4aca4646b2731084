"""KVPool: blocks of KV cache for one model, and the way of a request from prefill to decode."""

from __future__ import annotations

import secrets
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.integrations.transformers.blocks import BlockStore
from llm_datadist.integrations.transformers.cache import PagedCache
from llm_datadist.integrations.transformers.handle import KVHandle
from llm_datadist.keys import BlocksCacheKey
from llm_datadist.kv_layout import KVLayout
from llm_datadist.types import CacheDesc

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_datadist.cache import Cache
    from llm_datadist.datadist import LLMDataDist
    from llm_datadist.integrations.transformers.shape import KVShape

#: a model_id is a uint64; nobody hits another's by chance
_KEY_BITS = 63


class KVPool:
    """`num_blocks` blocks of `shape.block_tokens` tokens in this process's memory.

    `datadist` is initialised, with a cache manager; it reads and serves the blocks until it is
    finalized or the pool closed. The whole memory is taken at once: `nbytes`. Raises as
    `CacheManager.register_blocks_cache`.

    Thread-safe; a cache that it makes is for one thread at a time.
    """

    def __init__(self, datadist: LLMDataDist, shape: KVShape, num_blocks: int) -> None:
        self.shape = shape
        self._cluster_id = datadist.cluster_id
        self._manager = datadist.cache_manager
        self._store = BlockStore(shape, num_blocks)
        self._desc = CacheDesc(shape.num_tensors, [num_blocks, *shape.block], shape.data_type)
        self._layout = KVLayout.of(self._desc, shape.order)
        self._here = self._register(None)
        self._published: dict[int, PagedCache] = {}

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return self._store.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """How many of them no cache has at the moment."""
        return self._store.num_free

    @property
    def nbytes(self) -> int:
        """The memory of all blocks."""
        return self.num_blocks * self.shape.block_nbytes

    def new_cache(self) -> PagedCache:
        """An empty cache. It takes blocks when it grows."""
        return PagedCache(self._store)

    def publish(self, cache: PagedCache) -> KVHandle:
        """Lets peers fetch what `cache`, of this pool, holds now.

        Its blocks stay until `release`, called here or on the cache: once decode has fetched them.
        The cache may grow meanwhile. May be called again, for another handle.

        Raises LLMException: LLM_PARAM_INVALID for an empty cache, LLM_KV_CACHE_NOT_EXIST for one
        that was released, LLM_ENGINE_FINALIZED after `finalize`.
        """
        if cache.store is not self._store:
            raise invalid("the PagedCache is another pool's: publish it there")
        num_tokens = cache.get_seq_length()
        if not num_tokens:
            raise invalid("the PagedCache is empty: let a model fill it before it is published")
        filled, sequences = self.shape.num_blocks(num_tokens), cache.sequences
        blocks = tuple(block for each in sequences for block in each[:filled])
        # A registration of its own for each, although they share the memory: that gives it a
        # generation, by which a fetch in its very middle finds out that it was released.
        key = secrets.randbits(_KEY_BITS)
        registered = self._register(BlocksCacheKey(self._cluster_id, key))
        self._published[key] = cache
        cache.note_published(partial(self._withdraw, key, registered.cache_id))
        return KVHandle(self._cluster_id, key, num_tokens, blocks, self.shape, len(sequences))

    def fetch(self, handle: KVHandle) -> PagedCache:
        """A cache of this pool with the tokens that prefill published: `generate` goes on from it.

        Pulls the blocks from the cluster that the handle names, which must be linked. Returns when
        they are here; prefill may then release its own.

        Raises LLMException: LLM_PARAM_INVALID when the models or pools do not fit, with the fields
        that differ; LLM_KV_CACHE_NOT_EXIST when prefill has released them; OutOfBlocks; and as
        `CacheManager.pull_blocks`. No block stays taken then.
        """
        self.shape.check_prefill(handle.shape)
        source = BlocksCacheKey(handle.cluster_id, handle.key)
        return self._fetch([{source: each} for each in handle.sequences], handle.num_tokens)

    def fetch_shards(
        self, sources: Mapping[BlocksCacheKey, Sequence[int]], num_tokens: int
    ) -> PagedCache:
        """As `fetch`, of one sequence that several clusters have parts of: ranks with some KV
        heads, or some layers, each. `sources` as in `CacheManager.pull_shards`.

        They are caches with a layout (`KVLayout`) whose layers are numbered as this model's, in
        blocks of any size and order. Raises as `pull_shards` does, and OutOfBlocks.
        """
        return self._fetch([sources], num_tokens)

    def release(self, handle: KVHandle) -> None:
        """Releases the cache that was published as `handle`: nobody fetches it any more.

        Raises LLMException (LLM_KV_CACHE_NOT_EXIST) when it was not published here, or is released.
        """
        cache = self._published.get(handle.key)
        if cache is None:
            raise LLMException(
                f"no cache is published here as {handle.key} of cluster {handle.cluster_id}: it "
                "was released before, or by another pool",
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )
        cache.release()

    def close(self) -> None:
        """Releases what is published, and lets go of the memory: nothing can be fetched any more.

        Caches that are not published stay usable in this process.
        """
        for cache in list(self._published.values()):
            cache.release()
        self._unregister(self._here.cache_id)

    def _fetch(
        self, sequences: Sequence[Mapping[BlocksCacheKey, Sequence[int]]], num_tokens: int
    ) -> PagedCache:
        cache = self.new_cache()
        try:
            cache.reserve(num_tokens, len(sequences))
            for sources, ours in zip(sequences, cache.sequences, strict=True):
                self._pull(sources, ours, num_tokens)
        except BaseException:
            cache.release()
            raise
        cache.note_length(num_tokens)
        return cache

    def _pull(
        self,
        sources: Mapping[BlocksCacheKey, Sequence[int]],
        ours: Sequence[int],
        num_tokens: int,
    ) -> None:
        lists = {key: list(blocks) for key, blocks in sources.items()}
        if len(lists) == 1:
            ((key, blocks),) = lists.items()
            self._manager.pull_blocks(key, self._here, blocks, ours, tokens=num_tokens)
        else:
            self._manager.pull_shards(lists, self._here, ours, tokens=num_tokens)

    def _register(self, key: BlocksCacheKey | None) -> Cache:
        return self._manager.register_blocks_cache(
            self._desc, self._store.memory, key, layout=self._layout
        )

    def _withdraw(self, key: int, cache_id: int) -> None:
        del self._published[key]
        self._unregister(cache_id)

    def _unregister(self, cache_id: int) -> None:
        try:
            self._manager.unregister_cache(cache_id)
        except LLMException as error:
            # nothing is registered any more
            if error.status_code is not LLMStatusCode.LLM_ENGINE_FINALIZED:
                raise
