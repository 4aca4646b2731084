"""Blocks of caches that are named by id instead of by key, which C++ programs have. Spec 7.4."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from llm_datadist.core import plan
from llm_datadist.errors import invalid
from llm_datadist.operations.naming import remote_row
from llm_datadist.operations.pull import PulledTensors, check_access, destination
from llm_datadist.operations.push import PushedLayers, send, source_cache

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_datadist.cache import Cache
    from llm_datadist.core.remote import RemoteCache
    from llm_datadist.core.segments import Segments
    from llm_datadist.engine.engine import Engine
    from llm_datadist.keys import CacheKeyByIdAndIndex


def pull_blocks(
    engine: Engine,
    key: CacheKeyByIdAndIndex,
    cache: Cache,
    src_blocks: Sequence[int],
    dst_blocks: Sequence[int],
    options: Mapping[str, object],
) -> None:
    """As CacheManager.pull_blocks with a BlocksCacheKey."""
    _check_pairs(key, src_blocks, dst_blocks)
    tensors = PulledTensors.parse(options)
    with destination(engine, cache, "pull_blocks", key) as entry:
        local = entry.layout
        plan.check_blocks(local.geometry, dst_blocks, "destination")
        tensors.check(local.geometry)

        def segments(remote: RemoteCache, row: int) -> Segments:
            check_access(engine, remote, entry)
            src, dst = tensors.select(remote.layout, local)
            plan.check_blocks(src.geometry, src_blocks, "source")
            return plan.blocks_to_blocks(src, src_blocks, dst, dst_blocks)

        engine.pull(remote_row(key, tensors.src), segments)


def push_blocks(
    engine: Engine,
    key: CacheKeyByIdAndIndex,
    cache: Cache,
    src_blocks: Sequence[int],
    dst_blocks: Sequence[int],
    src_layers: range,
    dst_layers: range,
    tensors_per_layer: int,
) -> None:
    """As CacheManager.push_blocks with a BlocksCacheKey."""
    _check_pairs(key, src_blocks, dst_blocks)
    layers = PushedLayers(src_layers, dst_layers, tensors_per_layer)
    with source_cache(engine, cache, "push_blocks", key) as entry:
        plan.check_blocks(entry.layout.geometry, src_blocks, "source")

        def segments(remote: RemoteCache, row: int) -> Segments:
            src, dst = layers.select(entry.layout, remote.layout)
            plan.check_blocks(dst.geometry, dst_blocks, "destination")
            return plan.blocks_to_blocks(src, src_blocks, dst, dst_blocks)

        send(engine, key, entry, segments)


def copy_blocks(
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
        engine.copy(plan.blocks_to_blocks(src, sources, dst, targets))


def _check_pairs(
    key: CacheKeyByIdAndIndex, src_blocks: Sequence[int], dst_blocks: Sequence[int]
) -> None:
    if key.batch_index:
        raise invalid(f"{key} must have batch_index 0: blocks are named by src_blocks, dst_blocks")
    if not src_blocks:
        raise invalid("src_blocks is empty: name the blocks to move")
    if len(src_blocks) != len(dst_blocks):
        raise invalid(f"{len(src_blocks)} src_blocks do not pair with {len(dst_blocks)} dst_blocks")
