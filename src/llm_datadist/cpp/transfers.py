"""The part of LlmDataDist that moves bytes. Spec 7.4.

Each method makes one frozen value of its arguments, all checked, and has it carried out.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from llm_datadist.checks import (
    check_size,
    check_type,
    check_uint32,
    check_uint64,
    check_uint64_sequence,
)
from llm_datadist.core.remote import RemoteRow
from llm_datadist.core.transfer import (
    CopyBlocks,
    CopyRow,
    PullBlocks,
    PullRow,
    PushBlocks,
    PushRow,
)
from llm_datadist.cpp.arguments import parse_blocks, parse_cache, parse_index, parse_source
from llm_datadist.cpp.call import Call
from llm_datadist.cpp.layers import Layers
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.transfers.arguments import check_whole_row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.cpp.status import Status
    from llm_datadist.cpp.types import Cache, CacheIndex, KvCacheExtParam
    from llm_datadist.places.places import AnyCluster


class LlmTransfers:
    """Pulls, pushes and copies. Used through LlmDataDist."""

    def __init__(self, cluster_id: int) -> None:
        self._cluster_id = cluster_id
        self._cluster: AnyCluster | None = None

    # -- transfers --

    def PullKvCache(
        self,
        src_cache_index: CacheIndex,
        dst_cache: Cache,
        batch_index: int = 0,
        size: int = -1,
        ext_param: KvCacheExtParam | None = None,
    ) -> Status:
        """Copies a batch row of a peer's cache into row `batch_index` of ours. Spec 6.9, 7.4.

        `size` bytes of each tensor, from the rows' beginning; -1 is the whole of our row. Layer
        ranges count when both are given. Of `dst_cache` only the id is looked at.

        Returns LLM_PARAM_INVALID for what does not fit, LLM_KV_CACHE_NOT_EXIST (no such cache or
        row, here or there), LLM_NOT_YET_LINK, LLM_TIMEOUT.
        """
        with self._call("PullKvCache") as call:
            cluster = self._require_cluster()
            key = parse_index("src_cache_index", src_cache_index)
            cache_id = parse_cache("dst_cache", dst_cache)
            row, nbytes = check_uint32("batch_index", batch_index), check_size(size)
            layers = Layers.parse(ext_param).for_pull()
            named = (key, RemoteRow.of(key), cache_id, layers, True)
            cluster.transfers.run(PullRow(*named, row, nbytes))
        return call.status

    def PullKvBlocks(
        self,
        src_cache_index: CacheIndex,
        dst_cache: Cache,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        ext_param: KvCacheExtParam | None = None,
    ) -> Status:
        """Copies block `src_blocks[i]` of a peer's cache to block `dst_blocks[i]` of ours.

        In every tensor, or those of the layers in `ext_param`; blocks are equally large on both
        sides, and the `batch_index` of the source is 0. Returns as PullKvCache. Spec 6.10, 7.4.
        """
        with self._call("PullKvBlocks") as call:
            cluster = self._require_cluster()
            key = parse_index("src_cache_index", src_cache_index)
            cache_id = parse_cache("dst_cache", dst_cache)
            blocks = parse_blocks(key, src_blocks, dst_blocks)
            layers = Layers.parse(ext_param).for_pull()
            named = (key, RemoteRow.of(key), cache_id, layers, True)
            cluster.transfers.run(PullBlocks(*named, *blocks))
        return call.status

    def PushKvCache(
        self,
        src_cache: Cache,
        dst_cache_index: CacheIndex,
        src_batch_index: int = 0,
        size: int = -1,
        ext_param: KvCacheExtParam | None = None,
    ) -> Status:
        """Copies a batch row of ours into a row of a peer's cache. Spec 6.11, 7.4.

        `size` must be -1, the whole row, and the description in `src_cache` say kDevice. Without a
        source range all layers go into the first of the peer; with one, a destination range of
        equal length is needed. Returns as PullKvCache.
        """
        with self._call("PushKvCache") as call:
            cluster = self._require_cluster()
            cache_id = parse_source(src_cache)
            key = parse_index("dst_cache_index", dst_cache_index)
            row = check_uint32("src_batch_index", src_batch_index)
            check_whole_row(size)
            layers = Layers.parse(ext_param).for_push(_num_tensors(cluster, cache_id))
            cluster.transfers.run(PushRow(key, RemoteRow.of(key), cache_id, layers, row))
        return call.status

    def PushKvBlocks(
        self,
        src_cache: Cache,
        dst_cache_index: CacheIndex,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        ext_param: KvCacheExtParam | None = None,
    ) -> Status:
        """Copies block `src_blocks[i]` of ours to block `dst_blocks[i]` of a peer's cache.

        Layers as PushKvCache; the `batch_index` of the destination is 0. Spec 6.11, 7.4.
        """
        with self._call("PushKvBlocks") as call:
            cluster = self._require_cluster()
            cache_id = parse_source(src_cache)
            key = parse_index("dst_cache_index", dst_cache_index)
            blocks = parse_blocks(key, src_blocks, dst_blocks)
            layers = Layers.parse(ext_param).for_push(_num_tensors(cluster, cache_id))
            cluster.transfers.run(PushBlocks(key, RemoteRow.of(key), cache_id, layers, *blocks))
        return call.status

    # -- copies within this cluster --

    def CopyKvCache(
        self,
        src_cache: Cache,
        dst_cache: Cache,
        src_batch_index: int = 0,
        dst_batch_index: int = 0,
        offset: int = 0,
        size: int = -1,
    ) -> Status:
        """Copies a batch row, or `size` bytes behind `offset` of it, in every tensor. Spec 6.8.

        Both caches have as many tensors. Returns LLM_PARAM_INVALID for what does not fit,
        LLM_KV_CACHE_NOT_EXIST for a cache that is none or was freed. Seed 002.
        """
        with self._call("CopyKvCache") as call:
            cluster = self._require_cluster()
            src, dst = parse_cache("src_cache", src_cache), parse_cache("dst_cache", dst_cache)
            src_row = check_uint32("src_batch_index", src_batch_index)
            dst_row = check_uint32("dst_batch_index", dst_batch_index)
            begin, nbytes = check_uint64("offset", offset), check_size(size)
            cluster.transfers.run(CopyRow(src, dst, src_row, dst_row, begin, nbytes))
        return call.status

    def CopyKvBlocks(
        self,
        src_cache: Cache,
        dst_cache: Cache,
        src_blocks: Sequence[int],
        dst_blocks_list: Sequence[Sequence[int]],
    ) -> Status:
        """Copies block `src_blocks[i]` to block `dst_blocks_list[k][i]`, for every k. Spec 7.4.

        In every tensor; each inner list is as long as `src_blocks`. The copies have no defined
        order among each other. Returns as CopyKvCache. Seed 002.
        """
        with self._call("CopyKvBlocks") as call:
            cluster = self._require_cluster()
            src, dst = parse_cache("src_cache", src_cache), parse_cache("dst_cache", dst_cache)
            blocks = check_uint64_sequence("src_blocks", src_blocks)
            copies = check_type("dst_blocks_list", dst_blocks_list, list, tuple)
            lists = [check_uint64_sequence("a list of dst_blocks_list", each) for each in copies]
            for each in lists:
                if len(each) != len(blocks):
                    raise invalid(f"{len(blocks)} src_blocks do not pair with {len(each)} copies")
            targets = list(chain.from_iterable(lists))
            cluster.transfers.run(CopyBlocks(src, dst, list(blocks) * len(lists), targets))
        return call.status

    # -- parts of the above --

    def _call(self, name: str) -> Call:
        return Call(name, self._cluster_id)

    def _require_cluster(self) -> AnyCluster:
        if self._cluster is None:
            raise LLMException("not initialised: call Initialize first", LLMStatusCode.LLM_FAILED)
        return self._cluster


def _num_tensors(cluster: AnyCluster, cache_id: int) -> int:
    return cluster.catalog.num_tensors(cache_id)
