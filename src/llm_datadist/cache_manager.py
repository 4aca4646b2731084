"""CacheManager: registering caches, and pulling from those of linked peers. Spec 6."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, final

from llm_datadist.cache import Cache
from llm_datadist.checks import (
    check_int64,
    check_list,
    check_object,
    check_optional,
    check_sequence,
    check_type,
    check_uint32,
)
from llm_datadist.core import plan
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.registry import Entry, KeyName
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.keys import NO_ID, BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, is_valid_id
from llm_datadist.memory.host import unmapped
from llm_datadist.observe.log import get_logger
from llm_datadist.types import CacheDesc, Placement

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.core.remote import RemoteCache
    from llm_datadist.core.segments import Segments
    from llm_datadist.engine.engine import Engine

AnyKey: TypeAlias = CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey


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
        names = [_name_of(key) for key in keys]
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
        names = [] if key is None else [_name_of(key)]
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
        key = _check_row_key(cache_key)
        if engine.options.remote_accessible:
            check_type("cache_key with remote access enabled", key, CacheKeyByIdAndIndex)
        check_object("cache", cache, Cache)
        check_uint32("batch_index", batch_index)
        check_int64("size", size)
        _refuse_blocks(cache, "cache", "pull_cache", "pull_blocks")
        if size != -1 and size <= 0:
            raise invalid(f"size must be -1 or greater than 0, got {size}")
        tensors = _Tensors.parse(kwargs)
        _check_one_id(key)
        with self._destination(engine, cache, "pull_cache", key) as entry:
            local = entry.layout
            nbytes = local.geometry.row_nbytes if size == -1 else size
            if batch_index >= local.geometry.num_rows:
                raise invalid(
                    f"batch_index {batch_index} is out of range: "
                    f"our cache has {local.geometry.num_rows} rows"
                )
            plan.check_batch_rows(local.geometry, nbytes, "destination")
            tensors.check(local.geometry)

            def segments(remote: RemoteCache, row: int) -> Segments:
                row = _row_of(key, remote, row)
                _check_source(engine, remote, entry)
                plan.check_batch_rows(remote.layout.geometry, nbytes, "source")
                src, dst = tensors.select(remote.layout, local)
                return plan.row_to_row(src, row, dst, batch_index, nbytes)

            engine.pull(key.cluster_id, _lookup_name(key), segments)

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
        key = _check_any_key(src_cache_key)
        check_object("dst_cache", dst_cache, Cache)
        check_sequence("src_blocks", src_blocks, int)
        check_sequence("dst_blocks", dst_blocks, int)
        if not dst_cache.is_blocks_cache:
            raise invalid("dst_cache is no blocks cache: use pull_cache")
        if not dst_blocks:
            raise invalid("dst_blocks is empty: name the blocks to fill")
        tensors = _Tensors.parse(kwargs)
        _check_source_blocks(key, src_blocks, dst_blocks)
        _check_one_id(key)
        with self._destination(engine, dst_cache, "pull_blocks", key) as entry:
            local = entry.layout
            plan.check_blocks(local.geometry, dst_blocks, "destination")
            tensors.check(local.geometry)

            def segments(remote: RemoteCache, row: int) -> Segments:
                row = _row_of(key, remote, row)
                _check_source(engine, remote, entry)
                src, dst = tensors.select(remote.layout, local)
                if isinstance(key, BlocksCacheKey):
                    plan.check_blocks(src.geometry, src_blocks, "source")
                    return plan.blocks_to_blocks(src, src_blocks, dst, dst_blocks)
                plan.check_batch_rows(src.geometry, 0, "source")
                return plan.row_to_blocks(src, row, dst, dst_blocks)

            engine.pull(key.cluster_id, _lookup_name(key), segments)

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

    @contextmanager
    def _destination(self, engine: Engine, cache: Cache, verb: str, key: AnyKey) -> Iterator[Entry]:
        """Our cache, held for one transfer; failures of the transfer get named by what they did."""
        try:
            if engine.is_self(key.cluster_id):
                raise invalid("the key names this cluster itself; only a linked peer can be pulled")
            entry = engine.catalog.acquire(cache.cache_id)
            try:
                yield entry
            finally:
                engine.catalog.release(entry)
        except LLMException as error:
            raise LLMException(
                f"{verb} of {key} into cache {cache.cache_id}: {error}", error.status_code
            ) from error


class _Tensors:
    """Which tensors a pull moves: its layer ranges, as ranges of tensors. Spec 6.9."""

    __slots__ = ("_dst", "_per_layer", "_src")

    def __init__(self, src: range | None, dst: range | None, per_layer: int) -> None:
        self._src = plan.tensors_of_layers(src, per_layer)
        self._dst = plan.tensors_of_layers(dst, per_layer)
        self._per_layer = per_layer

    @classmethod
    def parse(cls, kwargs: dict[str, object]) -> _Tensors:
        per_layer = check_uint32("tensor_num_per_layer", kwargs.get("tensor_num_per_layer", 2))
        if not per_layer:
            raise invalid("tensor_num_per_layer must be greater than 0")
        src = _check_pulled_layers("src_layer_range", kwargs.get("src_layer_range"))
        dst = _check_pulled_layers("dst_layer_range", kwargs.get("dst_layer_range"))
        return cls(src, dst, per_layer)

    def check(self, local: Geometry) -> None:
        plan.check_pulled_tensors(local, self._src, self._dst, self._per_layer)

    def select(self, remote: Layout, local: Layout) -> tuple[Layout, Layout]:
        return plan.select_pulled_tensors(remote, local, self._src, self._dst)


def _check_pulled_layers(name: str, value: object) -> range | None:
    layers = check_optional(name, value, range)
    if not layers:
        return None
    if layers.step != 1 or layers.start < 0:
        raise invalid(f"{name} must count up by 1 from 0 or more, got {layers}")
    check_uint32(f"the end of {name}", layers.stop)
    return layers


def _check_row_key(key: object) -> CacheKey | CacheKeyByIdAndIndex:
    if key is None:
        raise AttributeError("cache_key is None: pass a CacheKey or CacheKeyByIdAndIndex")
    return check_type("cache_key", key, CacheKey, CacheKeyByIdAndIndex)


def _check_any_key(key: object) -> AnyKey:
    if key is None:
        raise AttributeError("src_cache_key is None: pass the key of the source")
    return check_type("src_cache_key", key, CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey)


def _check_one_id(key: object) -> None:
    if isinstance(key, CacheKey) and is_valid_id(key.req_id) == is_valid_id(key.prefix_id):
        raise invalid(f"{key} must have exactly one of req_id and prefix_id")


def _check_source_blocks(key: object, src_blocks: Sequence[int], dst_blocks: Sequence[int]) -> None:
    if not isinstance(key, BlocksCacheKey):
        if src_blocks:
            raise invalid(f"src_blocks must be empty: the source of {key} is a batch row")
    elif not src_blocks:
        raise invalid("src_blocks is empty: name the blocks to pull")
    elif len(src_blocks) != len(dst_blocks):
        raise invalid(f"{len(src_blocks)} src_blocks do not pair with {len(dst_blocks)} dst_blocks")


def _check_source(engine: Engine, remote: RemoteCache, local: Entry) -> None:
    """The rules on access and placement. Spec 6.9."""
    if engine.options.remote_accessible:
        if not local.is_remote_accessible:
            raise invalid(
                f"our cache {local.cache_id} is not remote accessible: register it with "
                "remote_accessible=True"
            )
    elif remote.placement == local.placement == Placement.HOST:
        raise LLMException(
            "both caches are placed on HOST: enable_remote_cache_accessible moves those too",
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
        )
    if not remote.is_remote_accessible:
        raise invalid(
            f"the peer's cache {remote.guard.cache_id} is not remote accessible: its owner must "
            "register it with remote_accessible=True"
        )


def _row_of(key: object, remote: RemoteCache, row: int) -> int:
    """The source row, by index or by key; one that is not there is LLM_KV_CACHE_NOT_EXIST."""
    if isinstance(key, CacheKeyByIdAndIndex):
        row = key.batch_index
    geometry = remote.layout.geometry
    if geometry.has_batch_rows and row >= geometry.num_rows:
        raise LLMException(
            f"the peer's cache {remote.guard.cache_id} has no row {row}, but {geometry.num_rows}",
            LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        )
    return row


def _lookup_name(key: AnyKey) -> int | KeyName:
    if isinstance(key, CacheKeyByIdAndIndex):
        return key.cache_id
    name = _name_of(key)
    assert name is not None  # _check_one_id refused a key with neither id
    return name


def _name_of(key: CacheKey | BlocksCacheKey) -> KeyName | None:
    """What a key is filed under; None for a placeholder."""
    if isinstance(key, BlocksCacheKey):
        return KeyName(NO_ID, key.model_id)
    if is_valid_id(key.prefix_id):
        return KeyName(key.prefix_id, key.model_id, is_prefix=True)
    return KeyName(key.req_id, key.model_id) if is_valid_id(key.req_id) else None


def _is_accessible(desc: CacheDesc, remote_accessible: bool | None) -> bool:
    return desc.placement == Placement.DEVICE if remote_accessible is None else remote_accessible


def _refuse_null(addrs: Sequence[int]) -> None:
    if 0 in addrs:
        raise invalid(f"addrs[{addrs.index(0)}] is 0: every tensor needs an address")


def _refuse_blocks(cache: Cache, name: str, verb: str, instead: str) -> None:
    if cache.is_blocks_cache:
        raise invalid(f"{name} of {verb} is a blocks cache: use {instead}")
