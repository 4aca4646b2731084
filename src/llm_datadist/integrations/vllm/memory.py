"""A worker's KV memory: what of it is known to others, and what is read into it."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist import BlocksCacheKey
from llm_datadist.integrations.vllm.regions import regions_of
from llm_datadist.integrations.vllm.shapes import GroupShape, RegionShape, Shape, reads_whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from llm_datadist.cache import Cache
    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.integrations.vllm.forms import Form
    from llm_datadist.integrations.vllm.groups import Group
    from llm_datadist.integrations.vllm.regions import Region
    from llm_datadist.integrations.vllm.step import Pull


class Peer(NamedTuple):
    """A worker that is read from."""

    cluster_id: int
    shape: Shape


class _Known(NamedTuple):
    """A region under its keys."""

    region: Region
    shape: RegionShape
    whole: Cache
    planes: dict[str, Cache]


class Memory:
    """Caches of one cluster, by model ids from `first_model_id` on. Thread-safe.

    Raises ValueError as `regions_of`.
    """

    def __init__(
        self,
        manager: CacheManager,
        cluster_id: int,
        first_model_id: int,
        kv_caches: Mapping[str, torch.Tensor],
        num_blocks: int,
        groups: Sequence[Group],
        forms: Mapping[str, Form],
        tp_size: int,
    ) -> None:
        self._manager, self._groups = manager, groups
        self._kv_caches = kv_caches  # the memory must outlive the cluster
        self._cluster_id, self._model_ids = cluster_id, count(first_model_id)
        self._known = [
            self._made_known(r) for r in regions_of(kv_caches, num_blocks, groups, forms)
        ]
        #: what readers are told
        self.shape = Shape(
            tp_size,
            [GroupShape(each.kept, each.span_tokens, each.block_tokens) for each in groups],
            [each.shape for each in self._known],
        )

    def read(self, peers: Sequence[Peer], pull: Pull) -> int:
        """Reads what the hand-over has of the pull's blocks, from workers of one engine; the bytes.

        All or nothing. Raises LookupError if the blocks do not fit, LLMException as `pull_shards`.
        """
        handed, ours = pull.source.remote_block_ids, pull.dst_blocks
        if not len(handed) == len(ours) == len(self._groups):
            raise LookupError("the hand-over is of other KV cache groups")
        return sum(self._read_region(known, peers, pull) for known in self._known)

    def _read_region(self, known: _Known, peers: Sequence[Peer], pull: Pull) -> int:
        layers = set(known.region.layers)
        sources = [
            (peer, other)
            for peer in peers
            for other in peer.shape.regions
            if not layers.isdisjoint(other.layers)
        ]
        if not sources:
            raise LookupError(f"no worker has {known.region.layers[0]}")
        ours, handed = pull.dst_blocks[known.region.group], pull.source.remote_block_ids
        group, theirs = self._groups[known.region.group], handed[known.region.group]
        span = pull.source.remote_num_tokens, pull.num_computed_tokens
        peer, other = sources[0]  # workers of one engine are alike in this
        if reads_whole(self.shape, known.shape, peer.shape, other):
            src, dst = group.pairs(theirs, ours, *span)
            keys = [BlocksCacheKey(each.cluster_id, at.whole) for each, at in sources]
            self._pull(keys, known.whole, src, dst, range(len(dst)))
            return known.region.nbytes(len(dst))
        block_tokens = peer.shape.groups[other.group].block_tokens
        src, dst, tokens = group.token_pairs(block_tokens, theirs, ours, *span)
        for name, cache in known.planes.items():
            keys = [BlocksCacheKey(each.cluster_id, at.planes[name]) for each, at in sources]
            self._pull(keys, cache, src, dst, tokens)
        return known.region.nbytes(1) * len(tokens) // group.block_tokens

    def _pull(
        self, keys: list[BlocksCacheKey], cache: Cache, src: list[int], dst: list[int], span: range
    ) -> None:
        if not dst:
            return
        if len(keys) == 1:
            self._manager.pull_blocks(keys[0], cache, src, dst, tokens=span)
        else:
            self._manager.pull_shards(dict.fromkeys(keys, src), cache, dst, tokens=span)

    def _made_known(self, region: Region) -> _Known:
        first = next(self._model_ids)
        whole = region.register(self._manager, BlocksCacheKey(self._cluster_id, first))
        ids = {plane.name: next(self._model_ids) for plane in region.form.planes}
        planes = {
            plane.name: region.register_plane(
                self._manager, plane, BlocksCacheKey(self._cluster_id, ids[plane.name])
            )
            for plane in region.form.planes
        }
        form = region.form
        shape = RegionShape(
            region.group, region.layers, form.name, region.block_nbytes // form.num_heads,
            form.heads is not None or form.is_replicated, first, ids,
        )  # fmt: skip
        return _Known(region, shape, whole, planes)
