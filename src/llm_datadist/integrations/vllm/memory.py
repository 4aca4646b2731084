"""A worker's KV memory: what of it is known to others, and what is read into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist import BlocksCacheKey
from llm_datadist.integrations.vllm.regions import regions_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.integrations.vllm.groups import Group
    from llm_datadist.integrations.vllm.step import Pull


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
    ) -> None:
        self._manager, self._groups = manager, groups
        self._kv_caches = kv_caches  # the memory must outlive the cluster
        self._regions = regions_of(kv_caches, num_blocks, groups)
        self._caches = [
            (model_id, region, region.register(manager, BlocksCacheKey(cluster_id, model_id)))
            for model_id, region in enumerate(self._regions, first_model_id)
        ]

    def facts(self) -> dict[str, object]:
        """What must be equal at both ends, so that blocks can be moved as they are."""
        return {
            "KV cache groups": [[each.kept, each.span_tokens] for each in self._groups],
            "block sizes": [each.block_tokens for each in self._groups],
            "layout of KV blocks": [
                [region.group, region.block_nbytes, region.layers] for region in self._regions
            ],
        }

    def read(self, cluster_id: int, pull: Pull) -> int:
        """Reads what the hand-over has of the pull's blocks; the bytes.

        Raises LookupError if the blocks do not fit, LLMException as `pull_blocks`.
        """
        source = pull.source
        if not len(source.remote_block_ids) == len(pull.dst_blocks) == len(self._groups):
            raise LookupError("the hand-over is of other KV cache groups")
        pairs = [
            group.pairs(handed, ours, source.remote_num_tokens, pull.num_computed_tokens)
            for group, handed, ours in zip(
                self._groups, source.remote_block_ids, pull.dst_blocks, strict=True
            )
        ]
        nbytes = 0
        for model_id, region, cache in self._caches:
            theirs, ours = pairs[region.group]
            if ours:
                key = BlocksCacheKey(cluster_id, model_id)
                self._manager.pull_blocks(key, cache, theirs, ours)
                nbytes += region.nbytes(len(ours))
        return nbytes
