"""CacheManager: the caches of a cluster, and all that moves between caches. Spec 6."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, final

from llm_datadist.cache import Cache
from llm_datadist.checks import (
    check_int64,
    check_object,
    check_optional,
    check_sequence,
)
from llm_datadist.core.geometry import CacheKind, Geometry
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.memory.tensors import check_addrs, locate
from llm_datadist.operations import copying, pull, push, transfer
from llm_datadist.operations.naming import check_one_id, name_of
from llm_datadist.operations.registering import register
from llm_datadist.types import CacheDesc, MemInfo, Memtype, Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from llm_datadist.cache_task import CacheTask
    from llm_datadist.core.registry import KeyName
    from llm_datadist.engine.engine import Engine
    from llm_datadist.layerwise import (
        LayerSynchronizer,
        TransferConfig,
        TransferWithCacheKeyConfig,
    )
    from llm_datadist.memory.dlpack import SupportsDLPack
    from llm_datadist.memory.tensors import Located

T = TypeVar("T", bound="int | SupportsDLPack")


@final
class CacheManager:
    """The caches of one LLMDataDist, and the transfers between them and those of its peers.

    Obtained from `LLMDataDist.cache_manager`. All methods may be called from any thread, at the
    same time; each blocks its caller, and those that reach a peer are bounded by `sync_kv_timeout`.
    After a failed pull the destination blocks or row may hold anything; nothing else was touched,
    and nothing arrives later.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine

    # -- registering --

    def register_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[T] | SupportsDLPack,
        cache_keys: Sequence[CacheKey] = (),
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Makes memory of the caller's a continuous cache: dim 0 counts batch rows. Spec 6.4.

        `addrs` has one address per tensor, each of `cache_desc.size` bytes; the memory stays the
        caller's, who keeps it until `unregister_cache`. `cache_keys[i]` names row i for peers; a
        CacheKey with neither id is a placeholder. `remote_accessible` says whether peers may use
        the memory; None is yes for DEVICE, no for HOST.

        An addition to the reference: in place of each address a tensor may stand (of numpy, torch,
        or any library with DLPack), and in place of the list one tensor with all of them, one
        behind the other. Their memory is kept until the cache is unregistered. They are of
        `cache_desc.data_type` (BF16 as bfloat16, or as its bits in uint16), contiguous, writable
        and on the CPU whatever the placement, and have as many elements as `cache_desc.shape`, in
        any shape.

        Raises TypeError for a wrong type, AttributeError for a missing description, LLMException
        (LLM_PARAM_INVALID) for addresses, tensors or a shape that cannot be. Thread-safe.
        """
        desc = check_object("cache_desc", cache_desc, CacheDesc)
        check_addrs(addrs)
        keys = check_sequence("cache_keys", cache_keys, CacheKey)
        check_optional("remote_accessible", remote_accessible, bool)
        memory = _locate(addrs, desc)
        if len(memory.addrs) != desc.num_tensors:
            raise invalid(f"{desc.num_tensors} tensors need as many addrs, got {len(memory.addrs)}")
        _refuse_null(memory.addrs)
        names = [name_of(key) for key in keys]
        return self._register(desc, memory, CacheKind.CONTINUOUS, names, remote_accessible)

    def register_blocks_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[T] | SupportsDLPack,
        blocks_cache_key: BlocksCacheKey | None = None,
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Makes memory of the caller's a blocks cache: dim 0 counts blocks. Spec 6.4.

        As `register_cache`, but that one key names the whole cache; registering another cache under
        the same key moves the key to it. Thread-safe.
        """
        desc = check_object("cache_desc", cache_desc, CacheDesc)
        check_addrs(addrs)
        key = check_optional("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        check_optional("remote_accessible", remote_accessible, bool)
        memory = _locate(addrs, desc)
        if _is_accessible(desc, remote_accessible):
            _refuse_null(memory.addrs)
        names = [] if key is None else [name_of(key)]
        return self._register(desc, memory, CacheKind.BLOCKS, names, remote_accessible)

    def unregister_cache(self, cache_id: int) -> None:
        """Forgets a cache and its keys; an unknown id is no error. Spec 6.4.

        Waits for this process's own transfers that use the memory, at most `sync_kv_timeout`; peers
        that are reading it get LLM_KV_CACHE_NOT_EXIST. Raises TypeError, ValueError, LLMException
        (LLM_TIMEOUT, the cache then stays registered). Thread-safe.
        """
        check_int64("cache_id", cache_id)
        engine = self._require_engine(LLMStatusCode.LLM_FAILED)
        engine.catalog.unregister(cache_id, engine.options.sync_timeout_s)

    # -- allocating --

    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: Sequence[CacheKey] = ()) -> Cache:
        """A continuous cache in the library's memory. Spec 6.3.

        The memory comes from `mem_pool_cfg` or `buf_pool_cfg` (DEVICE) or `host_mem_pool_cfg`
        (HOST), holds anything at first, and may be reached by peers. The cache id and each key hold
        a reference: it is freed when `deallocate_cache` dropped the one and pulls or
        `remove_cache_key` the others. `cache_keys[i]` names row i; a CacheKey with neither id is a
        placeholder, and of a key given twice the last counts.

        Raises TypeError, AttributeError for bad arguments; LLMException with LLM_OUT_OF_MEMORY, or
        LLM_PARAM_INVALID: no pool for that placement, more keys than rows, a key that is bound
        already. Thread-safe.
        """
        desc = check_object("cache_desc", cache_desc, CacheDesc)
        keys = check_sequence("cache_keys", cache_keys, CacheKey)
        return self._allocate(desc, CacheKind.CONTINUOUS, [name_of(key) for key in keys])

    def allocate_blocks_cache(
        self, cache_desc: CacheDesc, blocks_cache_key: BlocksCacheKey | None = None
    ) -> Cache:
        """A blocks cache in the library's memory, until `deallocate_blocks_cache`. Spec 6.3.

        As `allocate_cache`, but that one key names the whole cache. Thread-safe.
        """
        desc = check_object("cache_desc", cache_desc, CacheDesc)
        key = check_optional("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        return self._allocate(desc, CacheKind.BLOCKS, [] if key is None else [name_of(key)])

    def deallocate_cache(self, cache: Cache) -> None:
        """Drops the id's reference to a continuous cache. Spec 6.5.

        The memory is freed when no key holds it any more; until then peers can pull it. Nothing
        happens to a registered, unknown or deallocated cache. Raises TypeError, AttributeError;
        LLMException with LLM_PARAM_INVALID for a blocks cache, LLM_FEATURE_NOT_ENABLED without any
        pool. Thread-safe.
        """
        if check_object("cache", cache, Cache).is_blocks_cache:
            raise invalid("the cache is a blocks cache: use deallocate_blocks_cache")
        self._deallocate(cache)

    def deallocate_blocks_cache(self, cache: Cache) -> None:
        """Frees a blocks cache and its key at once. Otherwise as `deallocate_cache`. Spec 6.5."""
        if not check_object("cache", cache, Cache).is_blocks_cache:
            raise invalid("the cache is no blocks cache: use deallocate_cache")
        self._deallocate(cache)

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Drops a key's reference to an allocated cache, which peers cannot pull by it any more.

        Nothing happens for an unknown key or one of a registered cache. Raises TypeError,
        AttributeError; LLMException (LLM_FEATURE_NOT_ENABLED) without any pool. Thread-safe.
        Spec 6.6.
        """
        name = name_of(check_object("cache_key", cache_key, CacheKey))
        engine = self._require_pool()
        if name is not None:
            engine.catalog.remove_key(name)

    @staticmethod
    def check_cache_key(cache_key: CacheKey) -> None:
        """Says whether `pull_cache` could take a key: it has a req_id or a prefix_id, not both.

        Raises TypeError, AttributeError, LLMException (LLM_PARAM_INVALID). Spec 6, 6.9.
        """
        check_one_id(check_object("cache_key", cache_key, CacheKey))

    # -- pulling and pushing --

    def pull_cache(
        self,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        cache: Cache,
        batch_index: int = 0,
        size: int = -1,
        **kwargs: object,
    ) -> None:
        """Copies a batch row of a peer's continuous cache into row `batch_index` of ours. Spec 6.9.

        `size` bytes of each tensor, from the rows' beginning; -1 is the whole of our row. Keywords
        `src_layer_range`, `dst_layer_range` (range of layers) and `tensor_num_per_layer` (2) pick
        tensors; others are ignored. With remote access enabled only a CacheKeyByIdAndIndex will do.

        Raises TypeError, ValueError, AttributeError for bad arguments; LLMException with
        LLM_PARAM_INVALID (what does not fit), LLM_KV_CACHE_NOT_EXIST (no such cache, key or row),
        LLM_NOT_YET_LINK, LLM_TIMEOUT. Thread-safe.
        """
        engine = self._require_engine(LLMStatusCode.LLM_PARAM_INVALID)
        pull.pull_cache(engine, cache_key, cache, batch_index, size, kwargs)

    def pull_blocks(
        self,
        src_cache_key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey,
        dst_cache: Cache,
        src_blocks: Sequence[int] = (),
        dst_blocks: Sequence[int] = (),
        **kwargs: object,
    ) -> None:
        """Copies from a peer's cache into blocks of ours. Spec 6.10.

        With a BlocksCacheKey block `src_blocks[j]` goes to block `dst_blocks[j]`, in every tensor;
        blocks must be of equal size on both sides, their numbers may differ. With another key the
        source is a batch row, `src_blocks` stays empty, and the row's bytes fill `dst_blocks` in
        order; a shorter last chunk leaves the rest of its block alone. Keywords as `pull_cache`.

        Raises as `pull_cache` does. Thread-safe.
        """
        engine = self._require_engine(LLMStatusCode.LLM_PARAM_INVALID)
        pull.pull_blocks(engine, src_cache_key, dst_cache, src_blocks, dst_blocks, kwargs)

    def push_cache(
        self,
        dst_cache_key: CacheKeyByIdAndIndex,
        src_cache: Cache,
        src_batch_index: int = 0,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        size: int = -1,
        tensor_num_per_layer: int = 2,
    ) -> None:
        """Copies a batch row of ours into a row of a peer's continuous cache. Spec 6.11.

        Needs remote access enabled on both clusters. A layer range that is not given means all
        layers of `src_cache`; both must be equally long. `size` must be -1: the whole row.

        Raises TypeError, ValueError; LLMException as `pull_cache` does. Thread-safe.
        """
        push.push_cache(
            self._require_engine(LLMStatusCode.LLM_PARAM_INVALID),
            dst_cache_key,
            src_cache,
            src_batch_index,
            src_layer_range,
            dst_layer_range,
            size,
            tensor_num_per_layer,
        )

    def push_blocks(
        self,
        dst_cache_key: BlocksCacheKey,
        src_cache: Cache,
        src_blocks: Sequence[int] = (),
        dst_blocks: Sequence[int] = (),
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        tensor_num_per_layer: int = 2,
    ) -> None:
        """Copies block `src_blocks[j]` of ours to block `dst_blocks[j]` of a peer's cache.

        As `push_cache` otherwise. Spec 6.11. Thread-safe.
        """
        push.push_blocks(
            self._require_engine(LLMStatusCode.LLM_PARAM_INVALID),
            dst_cache_key,
            src_cache,
            src_blocks,
            dst_blocks,
            src_layer_range,
            dst_layer_range,
            tensor_num_per_layer,
        )

    def transfer_cache_async(
        self,
        src_cache: Cache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: Sequence[TransferConfig] | Sequence[TransferWithCacheKeyConfig],
        src_block_indices: Sequence[int] | None = None,
        dst_block_indices: Sequence[int] | None = None,
        dst_block_memory_size: int | None = None,
    ) -> CacheTask:
        """Sends a cache layer by layer, each as soon as `layer_synchronizer` lets it go. Spec 6.12.

        A layer is two tensors (K and V); the last may be one. Destinations are named by address
        (TransferConfig) or, with remote access enabled, by key (TransferWithCacheKeyConfig). With
        both lists of blocks, blocks go to blocks; with `dst_block_indices` alone a row is cut into
        blocks of `dst_block_memory_size` bytes; with neither a row goes to a row. A destination
        that fails does not stop the others; a layer that the synchronizer refuses (False) or fails
        on (an exception) ends the transfer. A config without `src_layer_range` gets all layers.

        Returns at once; the CacheTask tells the results. Raises TypeError, ValueError, LLMException
        (LLM_PARAM_INVALID) for bad arguments. Thread-safe; the source stays the caller's to keep.
        """
        return transfer.transfer_cache_async(
            self._require_engine(LLMStatusCode.LLM_PARAM_INVALID),
            src_cache,
            layer_synchronizer,
            transfer_configs,
            src_block_indices,
            dst_block_indices,
            dst_block_memory_size,
        )

    # -- copying within this process --

    def copy_cache(
        self,
        dst: Cache,
        src: Cache,
        dst_batch_index: int = 0,
        src_batch_index: int = 0,
        offset: int = 0,
        size: int = -1,
        req_id: int | None = None,
    ) -> None:
        """Copies a batch row, or `size` bytes behind `offset` of it, in every tensor. Spec 6.8.

        Both caches have as many tensors; placements may differ. `req_id` is for logs. Raises
        TypeError, ValueError, AttributeError; LLMException with LLM_PARAM_INVALID for what does not
        fit, LLM_KV_CACHE_NOT_EXIST for a freed cache. Thread-safe.
        """
        engine = self._require_engine(LLMStatusCode.LLM_PARAM_INVALID)
        copying.copy_cache(engine, dst, src, dst_batch_index, src_batch_index, offset, size, req_id)

    def copy_blocks(self, cache: Cache, copy_block_info: dict[int, list[int]]) -> None:
        """Copies each block to the blocks listed for it, in every tensor of a cache. Spec 6.8.

        The copies have no defined order among each other. Raises as `copy_cache`. Thread-safe.
        """
        engine = self._require_engine(LLMStatusCode.LLM_PARAM_INVALID)
        copying.copy_blocks(engine, cache, copy_block_info)

    def swap_blocks(self, src_cache: Cache, dst_cache: Cache, src_to_dst: dict[int, int]) -> None:
        """Copies blocks from HOST to DEVICE (swap in) or back (swap out). Spec 6.13.

        `src_to_dst` maps blocks of `src_cache` to those of `dst_cache` that take their bytes; the
        caches are equal in tensors and block size. Works by address, so a cache of
        `Cache.create_cpu_cache` will do. Raises as `copy_cache`. Thread-safe.
        """
        engine = self._require_engine(LLMStatusCode.LLM_PARAM_INVALID)
        copying.swap_blocks(engine, src_cache, dst_cache, src_to_dst)

    def remap_registered_memory(self, mem_infos: MemInfo | list[MemInfo]) -> None:
        """Checks its arguments; memory of this machine needs no remapping. Spec 6.14.

        Raises LLMException with LLM_PARAM_INVALID for what is no device memory, LLM_NOT_YET_LINK
        without any link. Thread-safe.
        """
        engine = self._require_engine(LLMStatusCode.LLM_PARAM_INVALID)
        infos = mem_infos if isinstance(mem_infos, list) else [mem_infos]
        for info in infos:
            _check_remapped(info)
        if not infos:
            raise invalid("mem_infos is empty")
        if not engine.links.all():
            raise LLMException("no cluster is linked", LLMStatusCode.LLM_NOT_YET_LINK)

    # -- parts of the above --

    def _find_bytes(self, cache_id: int, index: int) -> npt.NDArray[np.uint8]:
        """For Cache: the memory of a tensor; the array holds it."""
        engine = self._require_engine(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)
        return engine.catalog.view(cache_id, index)

    def _detach(self) -> None:
        """For LLMDataDist: the engine was finalized."""
        self._engine = None

    def _require_engine(self, status: LLMStatusCode) -> Engine:
        if self._engine is None:
            raise LLMException("this CacheManager's LLMDataDist was finalized", status)
        return self._engine

    def _allocate(self, desc: CacheDesc, kind: CacheKind, keys: Sequence[KeyName | None]) -> Cache:
        engine = self._require_engine(LLMStatusCode.LLM_FAILED)
        if not desc.num_tensors:
            raise invalid("a cache to allocate needs at least one tensor")
        if desc.placement not in engine.catalog.pools:
            option = "mem_pool_cfg" if desc.placement == Placement.DEVICE else "host_mem_pool_cfg"
            raise invalid(f"there is no pool for {desc.placement}: set LLMConfig.{option}")
        geometry = Geometry.of(kind, desc.num_tensors, desc.shape, desc.size)
        entry = engine.catalog.allocate(geometry, desc.placement, keys)
        addrs = entry.layout.addrs.tolist()
        return Cache(entry.cache_id, desc, addrs, self, False, kind is CacheKind.BLOCKS)

    def _deallocate(self, cache: Cache) -> None:
        self._require_pool().catalog.deallocate(cache.cache_id)
        cache._forget_memory()

    def _require_pool(self) -> Engine:
        engine = self._require_engine(LLMStatusCode.LLM_PARAM_INVALID)
        if not engine.catalog.pools:
            raise LLMException(
                "no memory pool is configured: set LLMConfig.mem_pool_cfg or host_mem_pool_cfg",
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            )
        return engine

    def _register(
        self,
        desc: CacheDesc,
        memory: Located,
        kind: CacheKind,
        keys: Sequence[KeyName | None],
        remote_accessible: bool | None,
    ) -> Cache:
        engine = self._require_engine(LLMStatusCode.LLM_FAILED)
        if remote_accessible and engine.has_rank_links:
            raise invalid("remote_accessible=True is not possible after link(): leave it out")
        entry = register(
            engine,
            Geometry.of(kind, desc.num_tensors, desc.shape, desc.size),
            memory.addrs,
            desc.placement,
            keys,
            is_remote_accessible=_is_accessible(desc, remote_accessible),
            held=memory.held,
        )
        is_blocks = kind is CacheKind.BLOCKS
        return Cache(entry.cache_id, desc, memory.addrs, self, True, is_blocks)


def _is_accessible(desc: CacheDesc, remote_accessible: bool | None) -> bool:
    return desc.placement == Placement.DEVICE if remote_accessible is None else remote_accessible


def _locate(addrs: list[T] | SupportsDLPack, desc: CacheDesc) -> Located:
    memory = locate(addrs, desc)
    if not memory.addrs:
        raise invalid("addrs is empty: give one address per tensor")
    return memory


def _refuse_null(addrs: Sequence[int]) -> None:
    if 0 in addrs:
        raise invalid(f"addrs[{addrs.index(0)}] is 0: every tensor needs an address")


def _check_remapped(info: object) -> None:
    if not isinstance(info, MemInfo):
        raise invalid(f"mem_infos must be MemInfo, got {type(info).__name__}")
    if info.mem_type is not Memtype.MEM_TYPE_DEVICE or not info.addr or (info.size or 0) <= 0:
        raise invalid(f"{info} is no device memory: type, address and size must say so")
