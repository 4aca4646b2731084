"""Pushing: a row or blocks of ours into a peer's cache (remote-accessible mode). Spec 6.11."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from llm_datadist.cache import Cache
from llm_datadist.checks import check_int64, check_sequence, check_type, check_uint32
from llm_datadist.core import plan
from llm_datadist.core.remote import Guard
from llm_datadist.errors import invalid
from llm_datadist.keys import BlocksCacheKey, CacheKeyByIdAndIndex
from llm_datadist.layerwise import check_optional_layer_range
from llm_datadist.operations.naming import AnyKey, Named, check_row, remote_row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.core.geometry import Geometry, Layout
    from llm_datadist.core.registry import Entry
    from llm_datadist.core.remote import RemoteCache
    from llm_datadist.core.segments import Segments
    from llm_datadist.engine.engine import Engine


def push_cache(
    engine: Engine,
    dst_cache_key: object,
    src_cache: object,
    src_batch_index: object,
    src_layer_range: object,
    dst_layer_range: object,
    size: object,
    tensor_num_per_layer: object,
) -> None:
    """See CacheManager.push_cache."""
    _check_mode(engine)
    key = check_type("dst_cache_key", dst_cache_key, CacheKeyByIdAndIndex)
    cache = check_type("src_cache", src_cache, Cache)
    src_row = check_uint32("src_batch_index", src_batch_index)
    if cache.is_blocks_cache:
        raise invalid("src_cache is a blocks cache: use push_blocks")
    layers = PushedLayers(src_layer_range, dst_layer_range, tensor_num_per_layer)
    check_whole_row(size)
    push_row(engine, key, cache.cache_id, src_row, layers)


def push_row(
    engine: Engine, key: CacheKeyByIdAndIndex, cache_id: int, src_row: int, layers: PushedLayers
) -> None:
    """A row of our cache into the one that the key names. As CacheManager.push_cache."""
    with _source(engine, cache_id, "push_cache", key) as entry:
        layers.ranges(entry.layout.geometry)

        def segments(remote: RemoteCache, dst_row: int) -> Segments:
            check_row(remote, dst_row)
            src, dst = layers.select(entry.layout, remote.layout)
            return rows(src, src_row, dst, dst_row)

        send(engine, key, entry, segments)


def push_blocks(
    engine: Engine,
    dst_cache_key: object,
    src_cache: object,
    src_blocks: object,
    dst_blocks: object,
    src_layer_range: object,
    dst_layer_range: object,
    tensor_num_per_layer: object,
) -> None:
    """See CacheManager.push_blocks."""
    _check_mode(engine)
    key = check_type("dst_cache_key", dst_cache_key, BlocksCacheKey)
    cache = check_type("src_cache", src_cache, Cache)
    src_list = check_sequence("src_blocks", src_blocks, int)
    dst_list = check_sequence("dst_blocks", dst_blocks, int)
    if not cache.is_blocks_cache:
        raise invalid("src_cache is no blocks cache: use push_cache")
    if not dst_list:
        raise invalid("dst_blocks is empty: name the blocks to fill")
    layers = PushedLayers(src_layer_range, dst_layer_range, tensor_num_per_layer)
    if len(src_list) != len(dst_list):
        raise invalid(f"{len(src_list)} src_blocks do not pair with {len(dst_list)} dst_blocks")
    push_into_blocks(engine, key, cache.cache_id, src_list, dst_list, layers)


def push_into_blocks(
    engine: Engine,
    key: BlocksCacheKey | CacheKeyByIdAndIndex,
    cache_id: int,
    src_blocks: Sequence[int],
    dst_blocks: Sequence[int],
    layers: PushedLayers,
) -> None:
    """Blocks of our cache into as many of the peer's. As CacheManager.push_blocks."""
    with _source(engine, cache_id, "push_blocks", key) as entry:
        layers.ranges(entry.layout.geometry)
        plan.check_blocks(entry.layout.geometry, src_blocks, "source")

        def segments(remote: RemoteCache, row: int) -> Segments:
            src, dst = layers.select(entry.layout, remote.layout)
            plan.check_blocks(dst.geometry, dst_blocks, "destination")
            return plan.blocks_to_blocks(src, src_blocks, dst, dst_blocks)

        send(engine, key, entry, segments)


def send(engine: Engine, key: AnyKey, entry: Entry, segments: plan.Planner) -> None:
    """Pushes what is planned out of a cache of ours, once both sides are seen to be accessible."""
    if not entry.is_remote_accessible:
        raise invalid(
            f"our cache {entry.cache_id} is not remote accessible: register it with "
            "remote_accessible=True"
        )

    def checked(remote: RemoteCache, row: int) -> Segments:
        if not remote.is_remote_accessible:
            raise invalid(
                f"the peer's cache {remote.guard.cache_id} is not remote accessible: its owner "
                "must register it with remote_accessible=True"
            )
        return segments(remote, row)

    engine.push(remote_row(key), guard_of(entry), checked)


def guard_of(entry: Entry) -> Guard:
    """What whoever fetches from our cache must find unchanged."""
    return Guard(entry.cache_id, entry.generation, entry.word_addr)


def rows(src: Layout, src_row: int, dst: Layout, dst_row: int) -> Segments:
    """A whole row of ours into a row that holds it (O13)."""
    nbytes = src.geometry.row_nbytes
    if src_row >= src.geometry.num_rows:
        raise invalid(f"src_batch_index {src_row} is out of range: {src.geometry.num_rows} rows")
    plan.check_batch_rows(dst.geometry, nbytes, "destination")
    return plan.row_to_row(src, src_row, dst, dst_row, nbytes)


class PushedLayers:
    """Which layers a push moves. Spec 6.11."""

    def __init__(self, src: object, dst: object, per_layer: object) -> None:
        self._per_layer = check_uint32("tensor_num_per_layer", per_layer)
        if not self._per_layer:
            raise invalid("tensor_num_per_layer must be greater than 0")
        self._src = check_optional_layer_range("src_layer_range", src)
        self._dst = check_optional_layer_range("dst_layer_range", dst)

    def ranges(self, src: Geometry) -> tuple[range, range]:
        """Both ranges; one that is not given is all layers of the source.

        A source of fewer tensors than a layer has none, and pushing none succeeds (O14).
        """
        everything = range(src.num_tensors // self._per_layer)
        wanted = everything if self._src is None else self._src
        target = everything if self._dst is None else self._dst
        if len(wanted) != len(target):
            raise invalid(f"src_layer_range {wanted} and dst_layer_range {target} differ in length")
        return wanted, target

    def select(self, src: Layout, dst: Layout) -> tuple[Layout, Layout]:
        """Both layouts cut to their layers."""
        wanted, target = self.ranges(src.geometry)
        return (
            src.tensors(self._tensors(src.geometry, wanted, "source")),
            dst.tensors(self._tensors(dst.geometry, target, "destination")),
        )

    def _tensors(self, geometry: Geometry, layers: range, whose: str) -> range:
        if layers and geometry.num_tensors % self._per_layer and whose == "source":
            raise invalid(
                f"the source has {geometry.num_tensors} tensors, which are no whole layers of "
                f"{self._per_layer}: set tensor_num_per_layer"
            )
        if layers and layers.stop > geometry.num_tensors // self._per_layer:
            raise invalid(
                f"layer {layers.stop - 1} is out of range: the {whose} has "
                f"{geometry.num_tensors // self._per_layer} layers of {self._per_layer} tensors"
            )
        return range(layers.start * self._per_layer, layers.stop * self._per_layer)


@contextmanager
def _source(engine: Engine, cache_id: int, verb: str, key: AnyKey) -> Iterator[Entry]:
    """Our cache, held for one transfer, whose failures get named by it."""
    with (
        Named(verb + " of cache {cache_id} to {key}", key, cache_id),
        engine.catalog.use(cache_id) as entry,
    ):
        yield entry


def check_whole_row(size: object) -> None:
    """A push has no other size than -1. Raises TypeError, ValueError, LLMException. Spec 6.11."""
    if check_int64("size", size) != -1:
        raise invalid(f"size must be -1, got {size}: a push moves whole rows")


def _check_mode(engine: Engine) -> None:
    if not engine.options.remote_accessible:
        raise invalid("pushing needs enable_remote_cache_accessible on both clusters")
