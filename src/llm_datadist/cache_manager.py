"""CacheManager: registering caches, and pulling from those of linked peers. Spec 6."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from llm_datadist.cache import Cache
from llm_datadist.checks import (
    check_int64,
    check_list,
    check_object,
    check_optional,
    check_sequence,
)
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.memory.host import unmapped
from llm_datadist.observe.log import get_logger
from llm_datadist.operations import pull
from llm_datadist.operations.naming import name_of
from llm_datadist.types import CacheDesc, Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.registry import KeyName
    from llm_datadist.engine.engine import Engine


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
        addrs: list[int],
        cache_keys: Sequence[CacheKey] = (),
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Makes memory of the caller's a continuous cache: dim 0 counts batch rows. Spec 6.4.

        `addrs` has one address per tensor, each of `cache_desc.size` bytes; the memory stays the
        caller's, who keeps it until `unregister_cache`. `cache_keys[i]` names row i for peers; a
        CacheKey with neither id is a placeholder. `remote_accessible` says whether peers may use
        the memory; None is yes for DEVICE, no for HOST.

        Raises TypeError for a wrong type, AttributeError for a missing description, LLMException
        (LLM_PARAM_INVALID) for addresses or a shape that cannot be. Thread-safe.
        """
        desc = check_object("cache_desc", cache_desc, CacheDesc)
        check_list("addrs", addrs, int)
        keys = check_sequence("cache_keys", cache_keys, CacheKey)
        check_optional("remote_accessible", remote_accessible, bool)
        if not addrs:
            raise invalid("addrs is empty: give one address per tensor")
        if len(addrs) != desc.num_tensors:
            raise invalid(f"{desc.num_tensors} tensors need as many addrs, got {len(addrs)}")
        _refuse_null(addrs)
        names = [name_of(key) for key in keys]
        return self._register(desc, addrs, CacheKind.CONTINUOUS, names, remote_accessible)

    def register_blocks_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[int],
        blocks_cache_key: BlocksCacheKey | None = None,
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Makes memory of the caller's a blocks cache: dim 0 counts blocks. Spec 6.4.

        As `register_cache`, but that one key names the whole cache; registering another cache under
        the same key moves the key to it. Thread-safe.
        """
        desc = check_object("cache_desc", cache_desc, CacheDesc)
        check_list("addrs", addrs, int)
        key = check_optional("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        check_optional("remote_accessible", remote_accessible, bool)
        if not addrs:
            raise invalid("addrs is empty: give one address per tensor")
        if _is_accessible(desc, remote_accessible):
            _refuse_null(addrs)
        names = [] if key is None else [name_of(key)]
        return self._register(desc, addrs, CacheKind.BLOCKS, names, remote_accessible)

    def unregister_cache(self, cache_id: int) -> None:
        """Forgets a cache and its keys; an unknown id is no error. Spec 6.4.

        Waits for this process's own transfers that use the memory, at most `sync_kv_timeout`; peers
        that are reading it get LLM_KV_CACHE_NOT_EXIST. Raises TypeError, ValueError, LLMException
        (LLM_TIMEOUT, the cache then stays registered). Thread-safe.
        """
        check_int64("cache_id", cache_id)
        engine = self._require_engine(LLMStatusCode.LLM_FAILED)
        engine.catalog.unregister(cache_id, engine.options.sync_timeout_s)

    # -- pulling --

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
        LLM_NOT_YET_LINK, LLM_TIMEOUT, LLM_FEATURE_NOT_ENABLED (host to host). Thread-safe.
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

    # -- parts of the above --

    def _detach(self) -> None:
        """For LLMDataDist: the engine was finalized."""
        self._engine = None

    def _require_engine(self, status: LLMStatusCode) -> Engine:
        if self._engine is None:
            raise LLMException("this CacheManager's LLMDataDist was finalized", status)
        return self._engine

    def _register(
        self,
        desc: CacheDesc,
        addrs: list[int],
        kind: CacheKind,
        keys: Sequence[KeyName | None],
        remote_accessible: bool | None,
    ) -> Cache:
        engine = self._require_engine(LLMStatusCode.LLM_FAILED)
        layout = Layout.at(Geometry.of(kind, desc.num_tensors, desc.shape, desc.size), addrs)
        for addr in unmapped(addrs, desc.size):
            get_logger().warning(
                "register: %#x (+%d bytes) is not mapped memory; transfers that use it will fail",
                addr, desc.size,
            )  # fmt: skip
        entry = engine.catalog.register(
            layout,
            desc.placement,
            keys,
            is_remote_accessible=_is_accessible(desc, remote_accessible),
        )
        is_blocks = kind is CacheKind.BLOCKS
        return Cache(entry.cache_id, desc, list(addrs), self, True, is_blocks)


def _is_accessible(desc: CacheDesc, remote_accessible: bool | None) -> bool:
    return desc.placement == Placement.DEVICE if remote_accessible is None else remote_accessible


def _refuse_null(addrs: Sequence[int]) -> None:
    if 0 in addrs:
        raise invalid(f"addrs[{addrs.index(0)}] is 0: every tensor needs an address")
