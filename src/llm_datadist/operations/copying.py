"""Copies between caches of this process. Spec 6.8, 6.13."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.cache import Cache
from llm_datadist.checks import (
    check_dict,
    check_object,
    check_sequence,
    check_size,
    check_uint32,
    check_uint64,
)
from llm_datadist.core import plan
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.errors import invalid
from llm_datadist.memory.device import HOST
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.engine.engine import Engine


def copy_cache(
    engine: Engine,
    dst: object,
    src: object,
    dst_batch_index: object,
    src_batch_index: object,
    offset: object,
    size: object,
    req_id: object,
) -> None:
    """See CacheManager.copy_cache."""
    dst_cache, src_cache = check_object("dst", dst, Cache), check_object("src", src, Cache)
    dst_row = check_uint32("dst_batch_index", dst_batch_index)
    src_row = check_uint32("src_batch_index", src_batch_index)
    start, nbytes = check_uint64("offset", offset), check_size(size)
    if req_id is not None:
        check_uint64("req_id", req_id)
    if dst_cache.is_blocks_cache or src_cache.is_blocks_cache:
        raise invalid("copy_cache copies batch rows: use copy_blocks for a blocks cache")
    copy_row(engine, src_cache.cache_id, src_row, dst_cache.cache_id, dst_row, start, nbytes)


def copy_row(
    engine: Engine, src_id: int, src_row: int, dst_id: int, dst_row: int, offset: int, size: int
) -> None:
    """A part of a row into the same part of another one. As CacheManager.copy_cache."""
    with engine.catalog.use(src_id) as source, engine.catalog.use(dst_id) as target:
        segments = plan.row_part_to_row(
            source.layout, src_row, target.layout, dst_row, offset, size
        )
        engine.copy(segments, source.space, target.space)


def copy_blocks(engine: Engine, cache: object, copy_block_info: object) -> None:
    """See CacheManager.copy_blocks."""
    target = check_object("cache", cache, Cache)
    pairs = check_dict("copy_block_info", copy_block_info, int, list)
    for block, copies in pairs.items():
        check_sequence(f"copy_block_info[{block}]", copies, int)
    if not target.is_blocks_cache:
        raise invalid("copy_blocks copies blocks: use copy_cache for a continuous cache")
    dst = list(chain.from_iterable(pairs.values()))
    if not dst:
        return
    lowest = min(chain(pairs, dst))
    if lowest < 0:  # as the reference; a block beyond the end is an LLMException
        raise TypeError(f"copy_block_info: a block number cannot be negative, got {lowest}")
    src = list(chain.from_iterable([block] * len(copies) for block, copies in pairs.items()))
    with engine.catalog.use(target.cache_id) as entry:
        plan.check_blocks(entry.layout.geometry, src, "cache")
        plan.check_blocks(entry.layout.geometry, dst, "cache")
        segments = plan.blocks_to_blocks(entry.layout, src, entry.layout, dst)
        engine.copy(segments, entry.space, entry.space)


def copy_blocks_between(
    engine: Engine,
    src_id: int,
    dst_id: int,
    src_blocks: Sequence[int],
    copies: Sequence[Sequence[int]],
) -> None:
    """Block src_blocks[i] of one cache to block copies[k][i] of another (or itself), for every k.

    Raises LLMException: LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID. Spec 7.4, O18.
    """
    for dst_blocks in copies:
        if len(dst_blocks) != len(src_blocks):
            raise invalid(f"{len(src_blocks)} src_blocks do not pair with {len(dst_blocks)} copies")
    with engine.catalog.use(src_id) as source, engine.catalog.use(dst_id) as target:
        src, dst = source.layout, target.layout
        if src.geometry.num_tensors != dst.geometry.num_tensors:
            raise invalid(
                f"{src.geometry.num_tensors} source tensors for {dst.geometry.num_tensors} "
                "destination tensors"
            )
        targets = list(chain.from_iterable(copies))
        if not targets:
            return
        plan.check_blocks(src.geometry, src_blocks, "source")
        plan.check_blocks(dst.geometry, targets, "destination")
        sources = list(src_blocks) * len(copies)
        segments = plan.blocks_to_blocks(src, sources, dst, targets)
        engine.copy(segments, source.space, target.space)


def swap_blocks(engine: Engine, src_cache: object, dst_cache: object, src_to_dst: object) -> None:
    """See CacheManager.swap_blocks."""
    src = check_object("src_cache", src_cache, Cache)
    dst = check_object("dst_cache", dst_cache, Cache)
    pairs = check_dict("src_to_dst", check_object("src_to_dst", src_to_dst, dict), int, int)
    if not (src.is_blocks_cache and dst.is_blocks_cache):
        raise invalid("swap_blocks works between blocks caches")
    placements = {src.cache_desc.placement, dst.cache_desc.placement}
    if placements != {Placement.HOST, Placement.DEVICE}:
        raise invalid("swap_blocks works between a HOST and a DEVICE cache")
    with _place_of(engine, src) as source, _place_of(engine, dst) as target:
        src_layout, dst_layout = source.layout, target.layout
        if src_layout.geometry.num_tensors != dst_layout.geometry.num_tensors:
            raise invalid(
                f"{src_layout.geometry.num_tensors} source tensors for "
                f"{dst_layout.geometry.num_tensors} destination tensors"
            )
        if src_layout.geometry.row_nbytes != dst_layout.geometry.row_nbytes:
            raise invalid(
                f"source blocks have {src_layout.geometry.row_nbytes} bytes, destination blocks "
                f"{dst_layout.geometry.row_nbytes}"
            )
        if pairs:
            blocks = list(pairs), list(pairs.values())
            plan.check_blocks(src_layout.geometry, blocks[0], "source")
            plan.check_blocks(dst_layout.geometry, blocks[1], "destination")
            segments = plan.blocks_to_blocks(src_layout, blocks[0], dst_layout, blocks[1])
            engine.copy(segments, source.space, target.space)


class Place(NamedTuple):
    """Where a cache of this process lies."""

    layout: Layout
    space: str


@contextmanager
def _place_of(engine: Engine, cache: Cache) -> Iterator[Place]:
    """Where a cache lies, held meanwhile; a CPU cache is in no table, its own addresses say it."""
    if cache.cache_id > 0:
        with engine.catalog.use(cache.cache_id) as entry:
            yield Place(entry.layout, entry.space)
    else:
        desc = cache.cache_desc
        geometry = Geometry.of(CacheKind.BLOCKS, desc.num_tensors, desc.shape, desc.size)
        yield Place(Layout.at(geometry, cache.tensor_addrs), HOST)
