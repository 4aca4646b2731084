"""Pulling: a peer's row or blocks into a cache of ours. Spec 6.9, 6.10."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.cache import Cache
from llm_datadist.checks import (
    check_object,
    check_optional,
    check_sequence,
    check_size,
    check_type,
    check_uint32,
)
from llm_datadist.core import plan
from llm_datadist.errors import invalid
from llm_datadist.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.operations.naming import AnyKey, Named, check_one_id, check_row, remote_row

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_datadist.core.geometry import Geometry, Layout
    from llm_datadist.core.registry import Entry
    from llm_datadist.core.remote import RemoteCache
    from llm_datadist.core.segments import Segments
    from llm_datadist.engine.catalog import Use
    from llm_datadist.engine.engine import Engine


def pull_cache(
    engine: Engine,
    cache_key: object,
    cache: object,
    batch_index: object,
    size: object,
    options: Mapping[str, object],
    *,
    src_offset: int = 0,
    dst_offset: int = 0,
) -> None:
    """See CacheManager.pull_cache; for the offsets, KvCacheManager.pull_cache."""
    key = _check_row_key(cache_key)
    if engine.options.remote_accessible:
        check_type("cache_key with remote access enabled", key, CacheKeyByIdAndIndex)
    target = check_object("cache", cache, Cache)
    dst_row = check_uint32("batch_index", batch_index)
    nbytes = check_size(size)
    if target.is_blocks_cache:
        raise invalid("cache is a blocks cache: use pull_blocks")
    tensors = PulledTensors.parse(options)
    check_one_id(key)
    pull_row(
        engine, key, target.cache_id, dst_row, nbytes, tensors,
        src_offset=src_offset, dst_offset=dst_offset,
    )  # fmt: skip


def pull_row(
    engine: Engine,
    key: CacheKey | CacheKeyByIdAndIndex,
    cache_id: int,
    dst_row: int,
    size: int,
    tensors: PulledTensors,
    *,
    src_offset: int = 0,
    dst_offset: int = 0,
) -> None:
    """The row that the key names into a row of our cache; a `size` of -1 is the rest of ours.

    Raises LLMException: see CacheManager.pull_cache.
    """
    with (
        Named("pull_cache of {key} into cache {cache_id}", key, cache_id),
        _destination(engine, cache_id, key) as entry,
    ):
        local = entry.layout
        nbytes = local.geometry.row_nbytes - dst_offset if size == -1 else size
        if dst_row >= local.geometry.num_rows:
            raise invalid(
                f"batch_index {dst_row} is out of range: our cache has rows 0 to "
                f"{local.geometry.num_rows - 1}"
            )
        plan.check_batch_rows(local.geometry, nbytes, "destination", dst_offset)
        tensors.check(local.geometry)

        def segments(remote: RemoteCache, row: int) -> Segments:
            check_row(remote, row)
            _check_access(engine, remote, entry)
            plan.check_batch_rows(remote.layout.geometry, nbytes, "source", src_offset)
            src, dst = tensors.select(remote.layout, local)
            return plan.row_to_row(
                src, row, dst, dst_row, nbytes, src_offset=src_offset, dst_offset=dst_offset
            )

        engine.pull(remote_row(key, tensors.src), segments, entry)


def pull_blocks(
    engine: Engine,
    src_cache_key: object,
    dst_cache: object,
    src_blocks: object,
    dst_blocks: object,
    options: Mapping[str, object],
) -> None:
    """See CacheManager.pull_blocks."""
    key = _check_any_key(src_cache_key)
    target = check_object("dst_cache", dst_cache, Cache)
    src_list = check_sequence("src_blocks", src_blocks, int)
    dst_list = check_sequence("dst_blocks", dst_blocks, int)
    if not target.is_blocks_cache:
        raise invalid("dst_cache is no blocks cache: use pull_cache")
    if not dst_list:
        raise invalid("dst_blocks is empty: name the blocks to fill")
    tensors = PulledTensors.parse(options)
    _check_source_blocks(key, src_list, dst_list)
    check_one_id(key)
    pull_into_blocks(engine, key, target.cache_id, src_list, dst_list, tensors)


def pull_into_blocks(
    engine: Engine,
    key: AnyKey,
    cache_id: int,
    src_blocks: Sequence[int],
    dst_blocks: Sequence[int],
    tensors: PulledTensors,
) -> None:
    """Blocks of the peer's cache into as many of ours; without `src_blocks`, the key's row.

    Raises LLMException: see CacheManager.pull_blocks.
    """
    with (
        Named("pull_blocks of {key} into cache {cache_id}", key, cache_id),
        _destination(engine, cache_id, key) as entry,
    ):
        local = entry.layout
        plan.check_blocks(local.geometry, dst_blocks, "destination")
        tensors.check(local.geometry)

        def segments(remote: RemoteCache, row: int) -> Segments:
            check_row(remote, row)
            _check_access(engine, remote, entry)
            src, dst = tensors.select(remote.layout, local)
            if src_blocks:
                plan.check_blocks(src.geometry, src_blocks, "source")
                return plan.blocks_to_blocks(src, src_blocks, dst, dst_blocks)
            plan.check_batch_rows(src.geometry, 0, "source")
            return plan.row_to_blocks(src, row, dst, dst_blocks)

        engine.pull(remote_row(key, tensors.src), segments, entry)


class PulledTensors:
    """Which tensors a pull moves: its layer ranges, as ranges of tensors."""

    __slots__ = ("_dst", "_per_layer", "src")

    def __init__(self, src: range | None, dst: range | None, per_layer: int) -> None:
        self.src = plan.tensors_of_layers(src, per_layer)
        self._dst = plan.tensors_of_layers(dst, per_layer)
        self._per_layer = per_layer

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> PulledTensors:
        if not options:
            return _ALL_TENSORS
        per_layer = check_uint32("tensor_num_per_layer", options.get("tensor_num_per_layer", 2))
        if not per_layer:
            raise invalid("tensor_num_per_layer must be greater than 0")
        src = _check_layers("src_layer_range", options.get("src_layer_range"))
        dst = _check_layers("dst_layer_range", options.get("dst_layer_range"))
        return cls(src, dst, per_layer)

    def check(self, local: Geometry) -> None:
        plan.check_pulled_tensors(local, self.src, self._dst, self._per_layer)

    def select(self, remote: Layout, local: Layout) -> tuple[Layout, Layout]:
        return plan.select_pulled_tensors(remote, local, self.src, self._dst)


_ALL_TENSORS = PulledTensors(None, None, 2)


def _destination(engine: Engine, cache_id: int, key: AnyKey) -> Use:
    """Our cache, held for one transfer from the cluster that the key names."""
    if engine.is_self(key.cluster_id):
        raise invalid("the key names this cluster itself; only a linked peer can be pulled")
    return engine.catalog.use(cache_id)


def _check_layers(name: str, value: object) -> range | None:
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


def _check_source_blocks(key: AnyKey, src: Sequence[int], dst: Sequence[int]) -> None:
    if not isinstance(key, BlocksCacheKey):
        if src:
            raise invalid(f"src_blocks must be empty: the source of {key} is a batch row")
    elif not src:
        raise invalid("src_blocks is empty: name the blocks to pull")
    elif len(src) != len(dst):
        raise invalid(f"{len(src)} src_blocks do not pair with {len(dst)} dst_blocks")


def _check_access(engine: Engine, remote: RemoteCache, local: Entry) -> None:
    """The rules on access; those on placement are none: host to host works. Spec 6.9, 6.10."""
    if engine.options.remote_accessible and not local.is_remote_accessible:
        raise invalid(
            f"our cache {local.cache_id} is not remote accessible: register it with "
            "remote_accessible=True"
        )
    if not remote.is_remote_accessible:
        raise invalid(
            f"the peer's cache {remote.guard.cache_id} is not remote accessible: its owner must "
            "register it with remote_accessible=True"
        )
