"""KvCacheManager: the caches of a cluster in the v1 mode. Spec Appendix C.

CacheManager does the work and has the rules. Here is what the v1 mode has besides: roles that are
enforced, caches that free themselves, offsets within rows, and tensors to look into.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, final

from llm_datadist.cache_manager import CacheManager
from llm_datadist.checks import (
    INT64_MAX,
    UINT32_MAX,
    check_int,
    check_object,
    check_optional,
    check_sequence,
    check_type,
)
from llm_datadist.core.geometry import CacheKind
from llm_datadist.core.registry import KeyName
from llm_datadist.errors import LLMException, LLMStatusCode, finalized, invalid
from llm_datadist.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.kv_cache import KvCache
from llm_datadist.locks import make_lock
from llm_datadist.memory.views import held_bytes, storage_type
from llm_datadist.tensor import Tensor, TensorDesc
from llm_datadist.types import CacheDesc, LLMRole, Placement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from llm_datadist.cache import Cache
    from llm_datadist.cache_task import CacheTask
    from llm_datadist.layerwise import LayerSynchronizer, TransferConfig
    from llm_datadist.places.places import AnyCluster

#: as a `tensor_index`
_ALL_TENSORS: Final = -1


@final
class KvCacheManager:
    """The caches of one LLMDataDist in the v1 mode, and the transfers to and from its peers.

    Obtained from `LLMDataDist.kv_cache_manager`. A PROMPT allocates caches under keys, and sends
    them layer by layer; a DECODER pulls. What the role does not allow is an LLMException
    (LLM_PARAM_INVALID), a cache of before a `finalize` one with LLM_KV_CACHE_NOT_EXIST, and a full
    pool one with LLM_DEVICE_OUT_OF_MEMORY, for which programs of this mode wait. Otherwise the
    methods are those of CacheManager in two-sided mode, for threads and failures too.

    Where the cluster has several devices a cache is on all of them, under one id, with the same
    keys; each operation is done on all, device i with device i of the peer, and succeeds when it
    was done on every one. Block lists, rows and sizes are those of each device.
    """

    def __init__(self, cluster: AnyCluster, role: LLMRole) -> None:
        self._cluster: AnyCluster | None = cluster
        self._role = role
        self._caches = CacheManager(cluster)
        #: ids of caches that nobody holds any more and that are still to be freed
        self._collected: deque[int] = deque()
        #: held while they are freed, so that an allocation can wait for that
        self._freeing = make_lock()

    # -- allocating --

    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: Sequence[CacheKey] = ()) -> KvCache:
        """A continuous cache in DEVICE memory; keys only for a PROMPT. Spec 6.3, Appendix C.

        The memory is sized by `ge.flowGraphMemMaxSize`, `mem_pool_cfg` or `buf_pool_cfg`. The cache
        holds a reference to it until it is deallocated or nobody holds it, and each key until it is
        pulled or removed. Keys and exceptions as `CacheManager.allocate_cache`, but for that of a
        full pool: LLM_DEVICE_OUT_OF_MEMORY. Thread-safe.
        """
        cluster = self._require_cluster()
        desc = _check_device_desc(cache_desc)
        keys = check_sequence("cache_keys", cache_keys, CacheKey)
        if keys:
            self._require_role("allocate_cache with cache_keys", LLMRole.PROMPT)
        names = [KeyName.of(key) for key in keys]
        return self._allocate(cluster, desc, CacheKind.MIX, names)

    def allocate_blocks_cache(
        self, cache_desc: CacheDesc, blocks_cache_key: BlocksCacheKey | None = None
    ) -> KvCache:
        """A blocks cache in DEVICE memory; the key not for a DECODER. Spec 6.3, Appendix C.

        It and its key go when it is deallocated or nobody holds it. Raises as
        `CacheManager.allocate_blocks_cache`, but for a full pool: LLM_DEVICE_OUT_OF_MEMORY.
        Thread-safe.
        """
        cluster = self._require_cluster()
        desc = _check_device_desc(cache_desc)
        key = check_optional("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        if key is not None:
            what = "allocate_blocks_cache with a blocks_cache_key"
            self._require_role(what, LLMRole.PROMPT, LLMRole.MIX)
        names = [] if key is None else [KeyName.of(key)]
        return self._allocate(cluster, desc, CacheKind.BLOCKS, names)

    def deallocate_cache(self, cache: KvCache) -> None:
        """Frees a cache of either kind; rows with keys stay until those go. Spec 6.5.

        Arrays of its tensors keep the memory out of the pool until they are gone. Nothing happens
        to a deallocated cache and to a cpu cache. Raises TypeError, AttributeError. Thread-safe.
        """
        self._require_cluster()
        ours = check_object("cache", cache, KvCache)
        if ours._manager is not self or not ours._let_go():
            return
        if ours._cache.is_blocks_cache:
            self._caches.deallocate_blocks_cache(ours._cache)
        else:
            self._caches.deallocate_cache(ours._cache)

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Drops a key's reference, for a PROMPT. As `CacheManager.remove_cache_key`. Spec 6.6."""
        self._require_cluster()
        check_object("cache_key", cache_key, CacheKey)
        self._require_role("remove_cache_key", LLMRole.PROMPT)
        self._caches.remove_cache_key(cache_key)

    # -- transfers --

    def pull_cache(
        self,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        cache: KvCache,
        batch_index: int = 0,
        size: int = -1,
        **kwargs: object,
    ) -> None:
        """Copies a batch row of a PROMPT's cache into a row of ours, for a DECODER. Spec 6.9.

        The keywords `src_cache_offset` and `dst_cache_offset` (none by default) say behind how many
        bytes of the row, in every tensor, the copy begins in the peer's cache and in ours; a `size`
        of -1 is then the rest of our row. Both parts must lie within their rows.

        Otherwise as `CacheManager.pull_cache`; raises ValueError for a negative offset, too.
        Thread-safe.
        """
        self._require_cluster()
        self._require_role("pull_cache", LLMRole.DECODER)
        target = self._inner(check_object("cache", cache, KvCache))
        src_offset = _check_offset("src_cache_offset", kwargs)
        dst_offset = _check_offset("dst_cache_offset", kwargs)
        self._caches._pull_row(cache_key, target, batch_index, size, kwargs, src_offset, dst_offset)

    def pull_blocks(
        self,
        prompt_cache_key: BlocksCacheKey,
        decoder_kv_cache: KvCache,
        prompt_blocks: Sequence[int],
        decoder_blocks: Sequence[int],
        **kwargs: object,
    ) -> None:
        """Copies block `prompt_blocks[j]` of a peer's cache to block `decoder_blocks[j]` of ours.

        For a DECODER. As `CacheManager.pull_blocks` with a BlocksCacheKey, and no other key. Spec
        6.10, Appendix C. Thread-safe.
        """
        self._require_cluster()
        self._require_role("pull_blocks", LLMRole.DECODER)
        key = check_object("prompt_cache_key", prompt_cache_key, BlocksCacheKey)
        target = self._inner(check_object("decoder_kv_cache", decoder_kv_cache, KvCache))
        self._caches.pull_blocks(key, target, prompt_blocks, decoder_blocks, **kwargs)

    def transfer_cache_async(
        self,
        src_cache: KvCache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: Sequence[TransferConfig],
        src_block_indices: Sequence[int] | None = None,
        dst_block_indices: Sequence[int] | None = None,
        dst_block_memory_size: int | None = None,
    ) -> CacheTask:
        """Sends a cache layer by layer to addresses of its peers, for a PROMPT. Spec 6.12.

        As `CacheManager.transfer_cache_async`, but that the task calls a transfer that still runs
        LLM_WAIT_PROCESS_TIMEOUT, and that with both lists of blocks a cache of `allocate_cache`
        will do: its batch rows are the blocks. The transfer holds the cache until it ends.
        Thread-safe.
        """
        self._require_cluster()
        self._require_role("transfer_cache_async", LLMRole.PROMPT)
        return self._caches.transfer_cache_async(
            self._inner(check_type("src_cache", src_cache, KvCache)),
            layer_synchronizer,
            transfer_configs,
            src_block_indices,
            dst_block_indices,
            dst_block_memory_size,
        )

    # -- within this process --

    def copy_cache(
        self,
        dst: KvCache,
        src: KvCache,
        dst_batch_index: int = 0,
        src_batch_index: int = 0,
        offset: int = 0,
        size: int = -1,
        req_id: int | None = None,
    ) -> None:
        """Copies a batch row, or a part of it. As `CacheManager.copy_cache`. Spec 6.8."""
        self._require_cluster()
        target = self._inner(check_object("dst", dst, KvCache))
        source = self._inner(check_object("src", src, KvCache))
        self._caches.copy_cache(
            target, source, dst_batch_index, src_batch_index, offset, size, req_id
        )

    def copy_blocks(self, cache: KvCache, copy_block_info: dict[int, list[int]]) -> None:
        """Copies blocks within a cache. As `CacheManager.copy_blocks`. Spec 6.8."""
        self._require_cluster()
        target = self._inner(check_object("cache", cache, KvCache))
        self._caches.copy_blocks(target, copy_block_info)

    def swap_blocks(
        self, src_cache: KvCache, dst_cache: KvCache, src_to_dst: dict[int, int]
    ) -> None:
        """Copies blocks between a cache and one of `KvCache.create_cpu_cache`, either way.

        As `CacheManager.swap_blocks`. Spec 6.13.
        """
        self._require_cluster()
        source = self._inner(check_object("src_cache", src_cache, KvCache))
        target = self._inner(check_object("dst_cache", dst_cache, KvCache))
        if src_cache._num_devices != dst_cache._num_devices:
            raise invalid(
                f"src_cache is on {src_cache._num_devices} device(s), dst_cache on "
                f"{dst_cache._num_devices}: create_cpu_cache takes a list for each device"
            )
        self._caches.swap_blocks(source, target, src_to_dst)

    def get_cache_tensors(self, cache: KvCache, tensor_index: int = 0) -> list[Tensor]:
        """Tensor `tensor_index` of a cache, or with -1 all of them, in order. Spec Appendix C.

        Of several devices that of each, those of the first device first. Nothing is copied: who
        writes to `Tensor.numpy()` writes to the cache (BF16 excepted, see there). An array keeps
        the cache, and its memory beyond `deallocate_cache` and `finalize`.

        Raises TypeError, ValueError, AttributeError; LLMException with LLM_PARAM_INVALID for an
        index out of range and for DT_STRING, LLM_KV_CACHE_NOT_EXIST for a deallocated cache and
        for a cpu cache. Thread-safe.
        """
        cluster = self._require_cluster()
        ours = check_object("cache", cache, KvCache)
        index = check_int("tensor_index", tensor_index, _ALL_TENSORS, UINT32_MAX)
        inner = self._inner(ours)
        if not ours._is_allocated():
            raise _missing(f"{cache} has no memory of this library's")
        count = inner.cache_desc.num_tensors
        if index >= count:
            raise invalid(f"tensor_index {index} is out of range: there are {count}")
        desc = TensorDesc(inner.cache_desc.data_type, ours._shape)
        wanted = range(count) if index == _ALL_TENSORS else [index]
        # the tensors of the second device follow those of the first
        at = [each + device * count for device in range(ours._num_devices) for each in wanted]
        kind = storage_type(desc.dtype)
        return [Tensor(_memory_of(cluster, inner, each).view(kind), desc) for each in at]

    # -- parts of the above --

    def _detach(self) -> None:
        """For LLMDataDist: the cluster was finalized."""
        self._cluster = None
        self._caches._detach()

    def _switch_role(self, role: LLMRole) -> None:
        """For LLMDataDist: the cluster has another role from here on."""
        self._role = role

    def _allocate(
        self, cluster: AnyCluster, desc: CacheDesc, kind: CacheKind, names: Sequence[KeyName | None]
    ) -> KvCache:
        """The rows of a MIX cache may be transferred as blocks, too; otherwise it is continuous."""
        self._free_collected()

        def make() -> KvCache:
            return KvCache(self._caches._allocate(cluster, desc, kind, names), self)

        try:
            return cluster.make(make, lambda cache: cache.cache_id)
        except LLMException as error:
            if error.status_code is not LLMStatusCode.LLM_OUT_OF_MEMORY:
                raise
            # what programs of this mode wait for, and try again
            raise LLMException(str(error), LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY) from error

    def _collect(self, cache_id: int) -> None:
        """For KvCache: nobody holds the cache any more.

        Called where the garbage collector strikes, perhaps in a thread that holds the locks which
        freeing needs: so it leaves that to another one.
        """
        cluster = self._cluster
        if cluster is not None:
            self._collected.append(cache_id)
            cluster.call_soon(self._free_collected)

    def _free_collected(self) -> None:
        cluster = self._cluster
        if cluster is None:  # a forked child may find the lock taken
            return
        with self._freeing:
            while self._collected:
                cluster.catalog.deallocate(self._collected.popleft())

    def _inner(self, cache: KvCache) -> Cache:
        """What the operations work on. Raises LLMException(LLM_KV_CACHE_NOT_EXIST).

        Ids begin anew with each `init`: that of an older cache may by now be another one's.
        """
        if cache._manager not in (None, self):
            raise _missing(f"{cache} is of another KvCacheManager, which was finalized")
        return cache._cache

    def _require_cluster(self) -> AnyCluster:
        """First in every method, as in CacheManager."""
        if self._cluster is None:
            raise finalized("KvCacheManager")
        return self._cluster

    def _require_role(self, what: str, *roles: LLMRole) -> None:
        if self._role not in roles:
            needed = " or ".join(str(role) for role in roles)
            raise invalid(f"{what} is for {needed}, the role of this cluster is {self._role}")


def _memory_of(cluster: AnyCluster, cache: Cache, index: int) -> npt.NDArray[np.uint8]:
    memory = cluster.catalog.view(cache.cache_id, index)
    return held_bytes(memory.ctypes.data, memory.nbytes, memory, cache)


def _check_device_desc(cache_desc: object) -> CacheDesc:
    desc = check_object("cache_desc", cache_desc, CacheDesc)
    if desc.placement != Placement.DEVICE:
        raise invalid(
            f"cache_desc must be placed on DEVICE, got {desc.placement}: "
            "KvCache.create_cpu_cache makes a cache of HOST memory"
        )
    return desc


def _check_offset(name: str, options: Mapping[str, object]) -> int:
    offset = options.get(name)
    return 0 if offset is None else check_int(name, offset, 0, INT64_MAX)


def _missing(message: str) -> LLMException:
    return LLMException(message, LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)
