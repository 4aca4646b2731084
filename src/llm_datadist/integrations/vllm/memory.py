"""A worker's KV memory: what of it is known to others, and what is read into it."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist import BlocksCacheKey
from llm_datadist.integrations.vllm.regions import regions_of
from llm_datadist.integrations.vllm.shapes import GroupShape, RegionShape, Shape, reads_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from llm_datadist.cache import Cache
    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.integrations.vllm.forms import Form
    from llm_datadist.integrations.vllm.groups import Group
    from llm_datadist.integrations.vllm.regions import Region


class Peer(NamedTuple):
    """A worker that is read from."""

    cluster_id: int
    shape: Shape


class Part(NamedTuple):
    """Of a request's tokens those behind the first `num_computed_tokens`, and where they lie.

    Blocks are by KV cache group: theirs as `Group.needed`, ours the request's whole list.
    """

    theirs: Sequence[Sequence[int]]
    ours: Sequence[Sequence[int]]
    num_tokens: int
    num_computed_tokens: int


class _Known(NamedTuple):
    """A region, and what is read into it. The shape is of the region that others know."""

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
        *,
        by_layer: bool = False,
    ) -> None:
        """`by_layer`: each layer can be read into alone."""
        self._manager, self._groups = manager, groups
        self._kv_caches = kv_caches  # the memory must outlive the cluster
        self._cluster_id, self._first_model_id = cluster_id, first_model_id
        self._regions = regions_of(kv_caches, num_blocks, groups, forms)
        self._reads_layers = by_layer
        #: none while it is unregistered
        self._known: list[_Known] = []
        self._by_layer: dict[str, _Known] = {}
        self.register()
        #: what readers are told
        self.shape = Shape(
            tp_size,
            [GroupShape(each.kept, each.span_tokens, each.block_tokens) for each in groups],
            [each.shape for each in self._known],
        )

    def register(self) -> None:
        """By the same model ids each time. May be called again."""
        if self._known:
            return
        model_ids = count(self._first_model_id)
        self._known = [self._made_known(region, model_ids) for region in self._regions]
        if self._reads_layers:
            self._by_layer = {
                layer: self._of_layer(known, layer)
                for known in self._known
                for layer in known.region.layers
            }

    def unregister(self) -> None:
        """The end of `register`: nobody reads it, or writes into it. May be called again.

        Raises LLMException when a transfer does not end.
        """
        for known in (*self._by_layer.values(), *self._known):
            for cache in (known.whole, *known.planes.values()):
                self._manager.unregister_cache(cache.cache_id)
        self._known, self._by_layer = [], {}

    def read(self, peers: Sequence[Peer], part: Part, layers: Sequence[str] | None = None) -> int:
        """Reads a part of a request's blocks from workers of one engine; how many bytes.

        All layers or, `by_layer`, these. All or nothing. Raises LookupError if the blocks do not
        fit, LLMException as `pull_shards`.
        """
        if not len(part.theirs) == len(part.ours) == len(self._groups):
            raise LookupError("the hand-over is of other KV cache groups")
        if not self._known:
            raise LookupError("the KV caches are not registered: the engine sleeps")
        known = self._known if layers is None else [self._by_layer[layer] for layer in layers]
        return sum(self._read_region(each, peers, part) for each in known)

    def _read_region(self, known: _Known, peers: Sequence[Peer], part: Part) -> int:
        layers = set(known.region.layers)
        sources = [
            (peer, other)
            for peer in peers
            for other in peer.shape.regions
            if not layers.isdisjoint(other.layers)
        ]
        if not sources:
            raise LookupError(f"no worker has {known.region.layers[0]}")
        ours, theirs = part.ours[known.region.group], part.theirs[known.region.group]
        group, span = self._groups[known.region.group], (part.num_tokens, part.num_computed_tokens)
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

    def _made_known(self, region: Region, model_ids: Iterator[int]) -> _Known:
        first = next(model_ids)
        whole = region.register(self._manager, BlocksCacheKey(self._cluster_id, first))
        ids = {plane.name: next(model_ids) for plane in region.form.planes}
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

    def _of_layer(self, known: _Known, layer: str) -> _Known:
        region = known.region.of_layer(layer)
        planes = {
            plane.name: region.register_plane(self._manager, plane, None)
            for plane in region.form.planes
        }
        return _Known(region, known.shape, region.register(self._manager, None), planes)
