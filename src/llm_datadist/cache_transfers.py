"""The part of a CacheManager that moves bytes. Spec 6.8 to 6.13.

Each method makes one frozen value of its arguments, all checked, and has it carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

from llm_datadist.cache import Cache
from llm_datadist.cache_task import CacheTask
from llm_datadist.checks import (
    check_dict,
    check_object,
    check_sequence,
    check_size,
    check_type,
    check_uint32,
    check_uint64,
)
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.layers import ALL_PULLED
from llm_datadist.core.remote import RemoteRow
from llm_datadist.core.shards import PullShard, PullShards
from llm_datadist.core.transfer import (
    CopyBlocks,
    CopyRow,
    Place,
    PullBlocks,
    PullRow,
    PushBlocks,
    PushRow,
)
from llm_datadist.errors import LLMStatusCode, finalized, invalid
from llm_datadist.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, check_one_id
from llm_datadist.layerwise import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.memory.device import HOST
from llm_datadist.transfers import layerwise
from llm_datadist.transfers.arguments import (
    check_layerwise_blocks,
    check_tokens,
    check_whole_row,
    pulled_layers,
    pushed_layers,
)
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from llm_datadist.keys import AnyKey
    from llm_datadist.places.places import AnyCluster


class CacheTransfers:
    """Pulls, pushes, layer-wise transfers and copies. Used through CacheManager."""

    def __init__(self, cluster: AnyCluster) -> None:
        self._cluster: AnyCluster | None = cluster

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
        self._pull_row(cache_key, cache, batch_index, size, kwargs)

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

        An addition to the reference: between caches with layouts (`register_blocks_cache`) tokens
        go where they belong, whatever the block sizes and orders; the peer's must hold all layers
        and heads of ours. The keyword `tokens` is how many of a sequence, or which (a range); the
        lists name the blocks in which those lie, in their order. Left out: all that both hold.

        Raises as `pull_cache` does. Thread-safe.
        """
        cluster = self._require_cluster()
        if src_cache_key is None:
            raise AttributeError("src_cache_key is None: pass the key of the source")
        key: AnyKey = check_type(
            "src_cache_key", src_cache_key, CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey
        )
        target = check_object("dst_cache", dst_cache, Cache)
        src = check_sequence("src_blocks", src_blocks, int)
        dst = check_sequence("dst_blocks", dst_blocks, int)
        if not target.is_blocks_cache:
            raise invalid("dst_cache is no blocks cache: use pull_cache")
        if not dst:
            raise invalid("dst_blocks is empty: name the blocks to fill")
        layers = pulled_layers(kwargs) if kwargs else ALL_PULLED
        _check_source_blocks(key, src, dst, target)
        span = check_tokens(kwargs.get("tokens")) if kwargs else None
        check_one_id(key)
        one_sided = cluster.options.remote_accessible
        place = RemoteRow.of(key)
        named = key, place, target.cache_id, layers, one_sided
        cluster.transfers.run(PullBlocks(*named, src, dst, span))

    def pull_shards(
        self,
        sources: Mapping[BlocksCacheKey, Sequence[int]],
        dst_cache: Cache,
        dst_blocks: Sequence[int],
        *,
        tokens: int | range | None = None,
    ) -> None:
        """Fills blocks of ours from several peers' caches, each of which holds a part of it.

        An addition to the reference, for unequal parallelism: the sources are shards of a model
        (heads, layers), `dst_cache` is another shard, or all of it; all have layouts. `sources`
        has the key of each and the blocks that hold the tokens there; `tokens` and the lists of
        blocks as in `pull_blocks`. What several sources hold is read from the first.

        All sources are read side by side (at most `transfer_threads` at a time), all or nothing:
        it returns when everything has arrived. When it raises, nothing but `dst_blocks` was
        touched, and nothing arrives later.

        Raises TypeError, AttributeError; LLMException as `pull_blocks`, and LLM_PARAM_INVALID where
        no source has a layer or a head that is needed, or a cache has no layout. Thread-safe.
        """
        cluster = self._require_cluster()
        target = check_object("dst_cache", dst_cache, Cache)
        dst = check_sequence("dst_blocks", dst_blocks, int)
        span, one_sided = check_tokens(tokens), cluster.options.remote_accessible
        if target.layout is None:
            raise invalid("dst_cache has no layout: register it with one")
        if not dst:
            raise invalid("dst_blocks is empty: name the blocks to fill")
        pairs: Mapping[BlocksCacheKey, Sequence[int]] = check_type("sources", sources, Mapping)  # type: ignore[type-abstract]
        if not pairs:
            raise invalid("sources is empty: name the caches to pull from")
        shards = [
            PullShard(
                check_type("a key of sources", key, BlocksCacheKey), RemoteRow.of(key),
                target.cache_id, ALL_PULLED, one_sided,
                check_sequence(f"the blocks of {key}", blocks, int), dst, span,
            )
            for key, blocks in pairs.items()
        ]  # fmt: skip
        cluster.transfers.run(PullShards(target.cache_id, shards))

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
        cluster = self._require_one_sided()
        key = check_type("dst_cache_key", dst_cache_key, CacheKeyByIdAndIndex)
        cache = check_type("src_cache", src_cache, Cache)
        row = check_uint32("src_batch_index", src_batch_index)
        if cache.is_blocks_cache:
            raise invalid("src_cache is a blocks cache: use push_blocks")
        layers = pushed_layers(src_layer_range, dst_layer_range, tensor_num_per_layer)
        check_whole_row(size)
        cluster.transfers.run(PushRow(key, RemoteRow.of(key), cache.cache_id, layers, row))

    def push_blocks(
        self,
        dst_cache_key: BlocksCacheKey,
        src_cache: Cache,
        src_blocks: Sequence[int] = (),
        dst_blocks: Sequence[int] = (),
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        tensor_num_per_layer: int = 2,
        *,
        tokens: int | range | None = None,
    ) -> None:
        """Copies block `src_blocks[j]` of ours to block `dst_blocks[j]` of a peer's cache.

        As `push_cache` otherwise. Between caches with layouts, and for `tokens`, as `pull_blocks`;
        but ours need not hold all of the peer's: what both hold of layers and heads goes, and the
        rest of the peer's blocks stays as it is, for other ranks to bring theirs. Where they have
        no layer or no head in common it is LLM_PARAM_INVALID. Spec 6.11. Thread-safe.
        """
        cluster = self._require_one_sided()
        key = check_type("dst_cache_key", dst_cache_key, BlocksCacheKey)
        cache = check_type("src_cache", src_cache, Cache)
        src = check_sequence("src_blocks", src_blocks, int)
        dst = check_sequence("dst_blocks", dst_blocks, int)
        if not cache.is_blocks_cache:
            raise invalid("src_cache is no blocks cache: use push_cache")
        if not dst:
            raise invalid("dst_blocks is empty: name the blocks to fill")
        layers = pushed_layers(src_layer_range, dst_layer_range, tensor_num_per_layer)
        if cache.layout is None and len(src) != len(dst):
            raise invalid(f"{len(src)} src_blocks do not pair with {len(dst)} dst_blocks")
        named = key, RemoteRow.of(key), cache.cache_id, layers, src, dst
        cluster.transfers.run(PushBlocks(*named, tokens=check_tokens(tokens)))

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
        blocks of `dst_block_memory_size` bytes; with neither a row goes to a row. Of a blocks cache
        that is its first block, at either end. A destination that fails does not stop the others;
        a layer that the synchronizer refuses (False) or fails on (an exception) ends the transfer.
        A config without `src_layer_range` gets all layers.

        Returns at once; the CacheTask tells the results. Raises TypeError, ValueError, LLMException
        (LLM_PARAM_INVALID) for bad arguments. Thread-safe; the source stays the caller's to keep.
        """
        cluster = self._require_cluster()
        cache = check_type("src_cache", src_cache, Cache)
        desc = cache.cache_desc
        if desc.placement == Placement.HOST:
            raise invalid("src_cache is placed on HOST: only a DEVICE cache can be transferred")
        src, dst, nbytes = check_layerwise_blocks(
            src_block_indices, dst_block_indices, dst_block_memory_size
        )
        synchronizer = check_type("layer_synchronizer", layer_synchronizer, LayerSynchronizer)  # type: ignore[type-abstract]
        one_sided = cluster.options.remote_accessible
        kind = TransferWithCacheKeyConfig if one_sided else TransferConfig
        configs: Sequence[layerwise.Config] = check_sequence(
            "transfer_configs", transfer_configs, kind
        )
        if not dst and nbytes:
            raise invalid("dst_block_memory_size is for dst_block_indices, which are not given")
        batch_size = None if cache.is_blocks_cache else desc.batch_size
        num_devices = cluster.options.num_devices
        destinations = tuple(
            layerwise.Destination.of(
                config,
                layerwise.check_config(
                    config,
                    desc.num_tensors,
                    batch_size,
                    has_blocks=bool(src),
                    num_devices=num_devices,
                ),
            )
            for config in configs
        )
        asked = layerwise.LayerwiseTransfer(
            cache.cache_id, cache, desc.num_tensors, destinations, tuple(src), tuple(dst), nbytes,
            num_devices,
        )  # fmt: skip
        task = CacheTask(len(configs), _unfinished_status(cluster))
        layerwise.begin(cluster.transfers, asked, synchronizer, task)
        return task

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
        cluster = self._require_cluster()
        target, source = check_object("dst", dst, Cache), check_object("src", src, Cache)
        dst_row = check_uint32("dst_batch_index", dst_batch_index)
        src_row = check_uint32("src_batch_index", src_batch_index)
        start, nbytes = check_uint64("offset", offset), check_size(size)
        if req_id is not None:
            check_uint64("req_id", req_id)
        if target.is_blocks_cache or source.is_blocks_cache:
            raise invalid("copy_cache copies batch rows: use copy_blocks for a blocks cache")
        ends = source.cache_id, target.cache_id
        cluster.transfers.run(CopyRow(*ends, src_row, dst_row, start, nbytes))

    def copy_blocks(self, cache: Cache, copy_block_info: dict[int, list[int]]) -> None:
        """Copies each block to the blocks listed for it, in every tensor of a cache. Spec 6.8.

        The copies have no defined order among each other. Raises as `copy_cache`. Thread-safe.
        """
        cluster = self._require_cluster()
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
        cluster.transfers.run(CopyBlocks(target.cache_id, target.cache_id, src, dst))

    def swap_blocks(self, src_cache: Cache, dst_cache: Cache, src_to_dst: dict[int, int]) -> None:
        """Copies blocks from HOST to DEVICE (swap in) or back (swap out). Spec 6.13.

        `src_to_dst` maps blocks of `src_cache` to those of `dst_cache` that take their bytes; the
        caches are equal in tensors and block size. Works by address, so a cache of
        `Cache.create_cpu_cache` will do. Raises as `copy_cache`. Thread-safe.
        """
        cluster = self._require_cluster()
        src = check_object("src_cache", src_cache, Cache)
        dst = check_object("dst_cache", dst_cache, Cache)
        pairs = check_dict("src_to_dst", check_object("src_to_dst", src_to_dst, dict), int, int)
        if not (src.is_blocks_cache and dst.is_blocks_cache):
            raise invalid("swap_blocks works between blocks caches")
        placements = {src.cache_desc.placement, dst.cache_desc.placement}
        if placements != {Placement.HOST, Placement.DEVICE}:
            raise invalid("swap_blocks works between a HOST and a DEVICE cache")
        ends = _place_of(src), _place_of(dst)
        cluster.transfers.run(CopyBlocks(*ends, list(pairs), list(pairs.values())))

    # -- parts of the above --

    def _find_bytes(self, cache_id: int, index: int) -> npt.NDArray[np.uint8]:
        """For Cache: the memory of a tensor; the array holds it."""
        if self._cluster is None:  # to who holds the cache it is gone, whatever the manager is
            raise finalized("CacheManager", LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)
        return self._cluster.catalog.view(cache_id, index)

    def _pull_row(
        self,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        cache: Cache,
        batch_index: int,
        size: int,
        options: Mapping[str, object],
        src_offset: int = 0,
        dst_offset: int = 0,
    ) -> None:
        """See `pull_cache`; for the offsets, KvCacheManager.pull_cache."""
        cluster = self._require_cluster()
        one_sided = cluster.options.remote_accessible
        if cache_key is None:
            raise AttributeError("cache_key is None: pass a CacheKey or CacheKeyByIdAndIndex")
        key: CacheKey | CacheKeyByIdAndIndex = check_type(
            "cache_key", cache_key, CacheKey, CacheKeyByIdAndIndex
        )
        if one_sided:
            check_type("cache_key with remote access enabled", key, CacheKeyByIdAndIndex)
        target = check_object("cache", cache, Cache)
        row, nbytes = check_uint32("batch_index", batch_index), check_size(size)
        if target.is_blocks_cache:
            raise invalid("cache is a blocks cache: use pull_blocks")
        layers = pulled_layers(options) if options else ALL_PULLED
        check_one_id(key)
        named = (key, RemoteRow.of(key), target.cache_id, layers, one_sided)
        cluster.transfers.run(PullRow(*named, row, nbytes, src_offset, dst_offset))

    def _require_one_sided(self) -> AnyCluster:
        cluster = self._require_cluster()
        if not cluster.options.remote_accessible:
            raise invalid("pushing needs enable_remote_cache_accessible on both clusters")
        return cluster

    def _require_cluster(self) -> AnyCluster:
        """First in every method, so that all answer alike when the cluster is gone. Spec 3.2."""
        if self._cluster is None:
            raise finalized("CacheManager")
        return self._cluster

    def _detach(self) -> None:
        """For LLMDataDist: the cluster was finalized."""
        self._cluster = None


def _check_source_blocks(
    key: AnyKey, src: Sequence[int], dst: Sequence[int], target: Cache
) -> None:
    if not isinstance(key, BlocksCacheKey):
        if src:
            raise invalid(f"src_blocks must be empty: the source of {key} is a batch row")
    elif not src:
        raise invalid("src_blocks is empty: name the blocks to pull")
    elif len(src) != len(dst) and target.layout is None:
        raise invalid(f"{len(src)} src_blocks do not pair with {len(dst)} dst_blocks")


def _unfinished_status(cluster: AnyCluster) -> LLMStatusCode:
    """What a time-out of a task is called. Spec 6.12; Appendix C for the v1 mode."""
    if cluster.options.cache_manager:
        return LLMStatusCode.LLM_TIMEOUT
    return LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT


def _place_of(cache: Cache) -> int | Place:
    """Where a cache lies; a CPU cache is in no catalog, its own addresses say it."""
    if cache.cache_id > 0:
        return cache.cache_id
    desc = cache.cache_desc
    num_tensors = len(cache.tensor_addrs)  # of all devices
    geometry = Geometry.of(CacheKind.BLOCKS, num_tensors, desc.shape, desc.size)
    return Place(Layout.at(geometry, cache.tensor_addrs), HOST)
