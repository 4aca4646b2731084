"""vLLM's plan: the mapping of its NIXL connector, and the descriptors that this makes of memory.

The mapping is a function. Descriptors are made by methods of its worker, which is given here only
what they read; a worker of a running engine has it from its model.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.kv_transfer.kv_connector.utils import TransferTopology
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.tp_mapping import compute_tp_mapping
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from planners.plans import Edge, Plan, merged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planners.problem import Problem, Rank

#: one tensor a layer, in blocks of heads of tokens of K and V: its LBHNC
ORDER: Final = "BHNKD"
#: the same of a latent cache
LATENT_ORDER: Final = "BND"


def topology(problem: Problem, tp_rank: int) -> Any:
    """What a rank of the destination knows of itself."""
    return TransferTopology(
        tp_rank=tp_rank, tp_size=problem.dst.tp, block_size=problem.dst.block_tokens,
        engine_id="here", is_mla=not problem.model.num_heads, is_mamba=False,
        total_num_kv_heads=problem.model.num_heads or 1, attn_backends=[],
    )  # fmt: skip


def plan(problem: Problem, destination: Rank) -> Plan:
    """What one destination reads, in pieces of the source's blocks."""
    here = topology(problem, destination.tp_rank)
    spec = FullAttentionSpec if problem.model.num_heads else MLAAttentionSpec
    mapping = compute_tp_mapping(here, problem.src.tp, (spec,))
    return Plan(
        frozenset(_edges(problem, destination, mapping)),
        merged(_moves(problem, destination, here, mapping, spec)),
    )


def _edges(problem: Problem, destination: Rank, mapping: Any) -> Iterator[Edge]:
    layout = destination.layout
    count = layout.heads.count // len(mapping.all_source_ranks)
    for source in mapping.all_source_ranks:
        there = mapping.rank_offset_factor * layout.heads.count
        here = mapping.rank_to_attention_slot[source] * count
        for layer in range(problem.model.num_layers):
            for head in range(count):
                place = here + head
                yield Edge(source, layer, layout.heads.first + place, there + head, place)


def _moves(
    problem: Problem, destination: Rank, here: Any, mapping: Any, spec: type
) -> Iterator[tuple[int, int, int]]:
    ratio = here.block_size_ratio(problem.src.block_tokens)
    worker = _worker(destination, here, spec)
    local = worker._build_fa_local(destination.addrs.tolist(), ratio)
    handles = [local.tolist()] * len(mapping.all_source_ranks)
    if here.tp_ratio(problem.src.tp) < 0 and problem.model.num_heads:
        handles = list(worker._build_local_splits_from_plan(mapping, local, len(local), ratio))
    sub_blocks = [block * ratio + sub for block in destination.blocks for sub in range(ratio)]
    for source, handle in zip(mapping.all_source_ranks, handles, strict=True):
        rank = problem.sources[source]
        remote = worker._build_fa_remote(mapping, _metadata(rank), ratio).tolist()
        for layer in range(problem.model.num_layers):
            theirs, ours = layer * rank.layout.num_blocks, layer * len(local) // len(rank.addrs)
            for block, sub_block in zip(rank.blocks, sub_blocks, strict=True):
                (src, nbytes, _), (dst, room, _) = remote[theirs + block], handle[ours + sub_block]
                assert nbytes == room, "a read of other length than its place"
                yield src, dst, nbytes


def _worker(rank: Rank, here: Any, spec: type) -> Any:
    """Of this rank, without an engine."""
    worker = object.__new__(NixlPullConnectorWorker)
    regions = len(rank.addrs)
    vars(worker).update(
        transfer_topo=here, device_id=0, _group_spec_types=(spec,), num_regions=regions,
        block_len_per_layer=[rank.layout.stride("B")] * regions,
        block_stride_per_layer=[rank.layout.stride("B")] * regions,
        region_num_blocks=[rank.layout.num_blocks] * regions,
        _region_is_mla=[here.is_mla] * regions, _transfer_layer_region_indices=(),
        _ple_region_index=None, _logical_num_blocks=rank.layout.num_blocks,
    )  # fmt: skip
    return worker


def _metadata(rank: Rank) -> Any:
    """What a source says in the hand-shake."""
    regions = len(rank.addrs)
    return SimpleNamespace(
        kv_caches_base_addr=rank.addrs.tolist(), region_num_blocks=None, device_id=0,
        num_blocks=rank.layout.num_blocks, block_strides=[rank.layout.stride("B")] * regions,
    )  # fmt: skip
