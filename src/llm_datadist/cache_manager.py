"""CacheManager: the caches of a cluster, and all that moves between caches. Spec 6."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast, final

from llm_datadist.cache import Cache
from llm_datadist.cache_transfers import CacheTransfers
from llm_datadist.checks import (
    INT32_MAX,
    check_int64,
    check_object,
    check_optional,
    check_sequence,
    check_type,
    check_uint32,
)
from llm_datadist.core.geometry import CacheKind, Geometry
from llm_datadist.core.registry import KeyName
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.keys import BlocksCacheKey, CacheKey, check_one_id
from llm_datadist.kv_layout import KVLayout
from llm_datadist.memory.tensors import check_addrs, locate
from llm_datadist.types import CacheDesc, MemInfo, Memtype, Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.cluster import Cluster
    from llm_datadist.memory.dlpack import SupportsDLPack
    from llm_datadist.memory.tensors import Located
    from llm_datadist.places.places import AnyCluster

T = TypeVar("T", bound="int | SupportsDLPack")


@final
class CacheManager(CacheTransfers):
    """The caches of one LLMDataDist, and the transfers between them and those of its peers.

    Obtained from `LLMDataDist.cache_manager`. All methods may be called from any thread, at the
    same time; each blocks its caller, and those that reach a peer are bounded by `sync_kv_timeout`.
    After a failed pull the destination blocks or row may hold anything; nothing else was touched,
    and nothing arrives later. After `finalize`, and in a forked child, each method is an
    LLMException (LLM_ENGINE_FINALIZED), whatever its arguments.
    """

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
        cluster = self._require_one()
        desc = check_object("cache_desc", cache_desc, CacheDesc)
        check_addrs(addrs)
        keys = check_sequence("cache_keys", cache_keys, CacheKey)
        check_optional("remote_accessible", remote_accessible, bool)
        memory = _locate(addrs, desc)
        if len(memory.addrs) != desc.num_tensors:
            raise invalid(f"{desc.num_tensors} tensors need as many addrs, got {len(memory.addrs)}")
        _refuse_null(memory.addrs)
        names = [KeyName.of(key) for key in keys]
        kind = CacheKind.CONTINUOUS
        return self._register(cluster, desc, memory, kind, names, remote_accessible)

    def register_blocks_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[T] | SupportsDLPack,
        blocks_cache_key: BlocksCacheKey | None = None,
        remote_accessible: bool | None = None,
        *,
        layout: KVLayout | None = None,
        readers: int = 0,
    ) -> Cache:
        """Makes memory of the caller's a blocks cache: dim 0 counts blocks. Spec 6.4.

        As `register_cache`, but that one key names the whole cache; registering another cache under
        the same key moves the key to it. Thread-safe.

        An addition to the reference: `layout` says what the blocks hold and where. Between two
        caches that have one, tokens go where they belong, whatever the layouts; the block axis of
        the layout counts the blocks then. Raises LLMException (LLM_PARAM_INVALID) for a layout that
        does not fit `cache_desc`. `readers` says how many pulls of it there will be, by how many
        ranks: see `wait_for_readers`.
        """
        cluster = self._require_one()
        desc = check_object("cache_desc", cache_desc, CacheDesc)
        check_addrs(addrs)
        key = check_optional("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        check_optional("remote_accessible", remote_accessible, bool)
        memory = _locate(addrs, desc)
        if _is_accessible(desc, remote_accessible):
            _refuse_null(memory.addrs)
        names = [] if key is None else [KeyName.of(key)]
        _check_layout(layout, desc)
        count = check_uint32("readers", readers)
        kind = CacheKind.BLOCKS
        # no `*`: a call by way of C code, behind which a strike would lose the cache
        return self._register(cluster, desc, memory, kind, names, remote_accessible, layout, count)

    def wait_for_readers(self, cache: Cache, timeout: float) -> bool:
        """Waits until `readers` pulls of a registered blocks cache have succeeded, so that its
        memory may be used for something else; False if that takes longer than `timeout` seconds.

        An addition to the reference. Readers that fail are not counted, and one that dies never
        comes: what to do when it is late is the program's to say, most will `unregister_cache`. A
        `pull_shards` counts once at each of its sources, when all has arrived. One that tries
        again, because it did not learn that it had succeeded, counts again.

        Raises TypeError, AttributeError, ValueError; LLMException (LLM_KV_CACHE_NOT_EXIST) when it
        is not registered, or is unregistered meanwhile. Thread-safe.
        """
        cluster = self._require_one()
        cache_id = check_object("cache", cache, Cache).cache_id
        seconds = check_type("timeout", timeout, int, float)
        if not 0 <= seconds < INT32_MAX:
            raise ValueError(f"timeout must be in [0, {INT32_MAX}), got {seconds}")
        return cluster.catalog.await_readers(cache_id, seconds)

    def unregister_cache(self, cache_id: int) -> None:
        """Forgets a cache and its keys; an unknown id is no error. Spec 6.4.

        Waits for this process's own transfers that use the memory, at most `sync_kv_timeout`; peers
        that are reading it get LLM_KV_CACHE_NOT_EXIST. Raises TypeError, ValueError, LLMException
        (LLM_TIMEOUT, the cache then stays registered). Thread-safe.
        """
        cluster = self._require_one()
        check_int64("cache_id", cache_id)
        cluster.catalog.unregister(cache_id, cluster.options.sync_timeout_s)

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
        cluster = self._require_cluster()
        desc = check_object("cache_desc", cache_desc, CacheDesc)
        keys = check_sequence("cache_keys", cache_keys, CacheKey)
        names = [KeyName.of(key) for key in keys]
        return self._allocate(cluster, desc, CacheKind.CONTINUOUS, names)

    def allocate_blocks_cache(
        self,
        cache_desc: CacheDesc,
        blocks_cache_key: BlocksCacheKey | None = None,
        *,
        layout: KVLayout | None = None,
    ) -> Cache:
        """A blocks cache in the library's memory, until `deallocate_blocks_cache`. Spec 6.3.

        As `allocate_cache`, but that one key names the whole cache; `layout` as of
        `register_blocks_cache`. Thread-safe.
        """
        cluster = self._require_cluster()
        desc = check_object("cache_desc", cache_desc, CacheDesc)
        key = check_optional("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        _check_layout(layout, desc)
        names = [] if key is None else [KeyName.of(key)]
        return self._allocate(cluster, desc, CacheKind.BLOCKS, names, layout)

    def deallocate_cache(self, cache: Cache) -> None:
        """Drops the id's reference to a continuous cache. Spec 6.5.

        The memory is freed when no key holds it any more; until then peers can pull it. Nothing
        happens to a registered, unknown or deallocated cache. Raises TypeError, AttributeError;
        LLMException with LLM_PARAM_INVALID for a blocks cache, LLM_FEATURE_NOT_ENABLED without any
        pool. Thread-safe.
        """
        cluster = self._require_cluster()
        if check_object("cache", cache, Cache).is_blocks_cache:
            raise invalid("the cache is a blocks cache: use deallocate_blocks_cache")
        self._deallocate(cluster, cache)

    def deallocate_blocks_cache(self, cache: Cache) -> None:
        """Frees a blocks cache and its key at once. Otherwise as `deallocate_cache`. Spec 6.5."""
        cluster = self._require_cluster()
        if not check_object("cache", cache, Cache).is_blocks_cache:
            raise invalid("the cache is no blocks cache: use deallocate_cache")
        self._deallocate(cluster, cache)

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Drops a key's reference to an allocated cache, which peers cannot pull by it any more.

        Nothing happens for an unknown key or one of a registered cache. Raises TypeError,
        AttributeError; LLMException (LLM_FEATURE_NOT_ENABLED) without any pool. Thread-safe.
        Spec 6.6.
        """
        cluster = self._require_cluster()
        name = KeyName.of(check_object("cache_key", cache_key, CacheKey))
        _require_pool(cluster)
        if name is not None:
            cluster.catalog.remove_key(name)

    @staticmethod
    def check_cache_key(cache_key: CacheKey) -> None:
        """Says whether `pull_cache` could take a key: it has a req_id or a prefix_id, not both.

        Raises TypeError, AttributeError, LLMException (LLM_PARAM_INVALID). Spec 6, 6.9.
        """
        check_one_id(check_object("cache_key", cache_key, CacheKey))

    def remap_registered_memory(self, mem_infos: MemInfo | list[MemInfo]) -> None:
        """Checks its arguments; memory of this machine needs no remapping. Spec 6.14.

        Raises LLMException with LLM_PARAM_INVALID for what is no device memory, LLM_NOT_YET_LINK
        without any link. Thread-safe.
        """
        cluster = self._require_one()
        infos = mem_infos if isinstance(mem_infos, list) else [mem_infos]
        for info in infos:
            _check_remapped(info)
        if not infos:
            raise invalid("mem_infos is empty")
        if not cluster.links.all():
            raise LLMException("no cluster is linked", LLMStatusCode.LLM_NOT_YET_LINK)

    # -- parts of the above --

    def _allocate(
        self,
        cluster: AnyCluster,
        desc: CacheDesc,
        kind: CacheKind,
        keys: Sequence[KeyName | None],
        layout: KVLayout | None = None,
    ) -> Cache:
        if not desc.num_tensors:
            raise invalid("a cache to allocate needs at least one tensor")
        if desc.placement not in cluster.catalog.pools:
            option = "mem_pool_cfg" if desc.placement == Placement.DEVICE else "host_mem_pool_cfg"
            raise invalid(f"there is no pool for {desc.placement}: set LLMConfig.{option}")
        geometry = Geometry.of(kind, desc.num_tensors, desc.shape, desc.size)

        def make() -> Cache:
            entry = cluster.catalog.allocate(geometry, desc.placement, keys, layout)
            addrs = entry.layout.addrs.tolist()
            return Cache(entry.cache_id, desc, addrs, self, False, kind is CacheKind.BLOCKS, layout)

        return cluster.make(make, lambda cache: cache.cache_id)

    def _deallocate(self, cluster: AnyCluster, cache: Cache) -> None:
        _require_pool(cluster)
        cluster.catalog.deallocate(cache.cache_id)
        cache._forget_memory()

    def _require_one(self) -> Cluster:
        """For what only the cache manager has, whose cluster has one device."""
        return cast("Cluster", self._require_cluster())

    def _register(
        self,
        cluster: Cluster,
        desc: CacheDesc,
        memory: Located,
        kind: CacheKind,
        keys: Sequence[KeyName | None],
        remote_accessible: bool | None,
        layout: KVLayout | None = None,
        num_readers: int = 0,
    ) -> Cache:
        if remote_accessible and cluster.ranks.were_made:
            raise invalid("remote_accessible=True is not possible after link(): leave it out")

        def make() -> Cache:
            entry = cluster.catalog.register(
                Geometry.of(kind, desc.num_tensors, desc.shape, desc.size),
                memory.addrs,
                desc.placement,
                keys,
                is_remote_accessible=_is_accessible(desc, remote_accessible),
                held=memory.held,
                kv_layout=layout,
                num_readers=num_readers,
            )
            is_blocks = kind is CacheKind.BLOCKS
            return Cache(entry.cache_id, desc, memory.addrs, self, True, is_blocks, layout)

        return cluster.make(make, lambda cache: cache.cache_id)


def _require_pool(cluster: AnyCluster) -> None:
    if not cluster.catalog.pools:
        raise LLMException(
            "no memory pool is configured: set LLMConfig.mem_pool_cfg or host_mem_pool_cfg",
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
        )


def _check_layout(layout: KVLayout | None, desc: CacheDesc) -> None:
    check_optional("layout", layout, KVLayout)
    if layout is None:
        return
    if layout.data_type is not desc.data_type:
        raise invalid(f"the layout is of {layout.data_type.name}, cache_desc {desc.data_type}")
    layout.check_cache(desc.num_tensors, desc.size)


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
