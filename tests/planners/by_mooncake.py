"""Mooncake's plan: placements, logical edges, then writes between registered regions."""

from __future__ import annotations

from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from mooncake.reshard import kv_cache as mk

from planners.plans import Edge, Plan, merged
from planners.problem import DATA_TYPE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planners.problem import Engine, Problem, Rank

_RESOURCE: Final = "cache"
_REVISION: Final = "1"
_OPERATION: Final = "request"
_DIGEST: Final = sha256(b"").hexdigest()
_COMPONENTS: Final = (mk.KVCacheComponent.KEY, mk.KVCacheComponent.VALUE)


class Planner:
    """All that it is told, and what it says. Raises ValueError where it refuses."""

    def __init__(self, problem: Problem, limits: Any = None) -> None:
        self._problem = problem
        self._limits = limits or mk.KVCacheTransferLimits()
        self.source = self._placement("src", problem.src, problem.sources)
        self.target = self._placement("dst", problem.dst, problem.destinations)
        self._snapshot = mk.KVCacheSnapshotDescriptor(
            namespace="tests", resource_id=_RESOURCE, model_id="model", model_revision=_REVISION,
            token_start=problem.tokens.start, token_count=len(problem.tokens),
            token_fingerprint=_DIGEST, semantic_fingerprint=_DIGEST,
        )  # fmt: skip

    # -- what is made once for two engines --

    @cached_property
    def logical(self) -> list[Any]:
        """The edges, destination by destination."""
        return [
            mk.plan_kv_cache_transfer_to_local_target(
                self.source, self.target, _name("dst", rank), snapshot=self._snapshot
            )
            for rank in self._problem.destinations
        ]

    @cached_property
    def bindings(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What a runtime says about its memory: a range for each block."""
        writers = {name for plan in self.logical for name in plan.expected_writer_ids}
        sources = [r for r in self._problem.sources if _name("src", r) in writers]
        return (
            tuple(self._binding("src", self.source, rank) for rank in sources),
            tuple(self._binding("dst", self.target, rank) for rank in self._problem.destinations),
        )

    # -- what each request takes --

    def writes(self) -> Any:
        """Every write of every destination."""
        plan = mk.KVCacheRuntimeTransferPlan(
            _OPERATION, tuple(self.logical), *self.bindings, self._limits
        )
        return plan.writes

    def plans(self) -> list[Plan]:
        """Its plan for each destination."""
        moves: dict[str, list[tuple[int, int, int]]] = {}
        for write in self.writes():
            move = write.source_address, write.target_address, write.nbytes
            moves.setdefault(write.target_participant_id, []).append(move)
        return [
            Plan(frozenset(_edges(logical)), merged(moves[logical.target_participant_id]))
            for logical in self.logical
        ]

    # -- parts of the above --

    def _placement(self, end: str, engine: Engine, ranks: list[Rank]) -> Any:
        model = self._problem.model
        descriptor = mk.KVCacheDescriptor(
            tuple(range(model.num_layers)), DATA_TYPE.name, DATA_TYPE.itemsize,
            engine.block_tokens, model.num_heads, model.head_size, model.head_size,
        )  # fmt: skip
        at = {
            rank.index: mk.KVCacheRank(0, rank.index // engine.tp, rank.tp_rank) for rank in ranks
        }
        topology = mk.KVCacheTopology(
            dp_size=1, pp_size=engine.pp, tp_size=engine.tp,
            participants=tuple(
                mk.KVCacheTopologyParticipant(_name(end, rank), at[rank.index]) for rank in ranks
            ),
        )  # fmt: skip
        replicas = max(1, engine.tp // model.num_heads)
        parts = [
            mk.KVCachePlacementPart(
                _RESOURCE, _REVISION, end, topology.topology_id, _name(end, rank), at[rank.index],
                descriptor, rank.layout.layers, rank.layout.heads.first, rank.layout.heads.count,
                rank.tp_rank % replicas, replicas,
            )
            for rank in ranks
        ]  # fmt: skip
        return mk.assemble_kv_cache_placement(
            parts, dp_size=1, pp_size=engine.pp, tp_size=engine.tp
        )

    def _binding(self, end: str, placement: Any, rank: Rank) -> Any:
        name, layout = _name(end, rank), rank.layout
        regions = tuple(
            mk.KVCacheRegisteredRegion(f"{tensor:04}", name, int(addr), layout.nbytes)
            for tensor, addr in enumerate(rank.addrs)
        )
        return mk.KVCacheResolvedRuntimeBinding(
            _OPERATION, _RESOURCE, placement.placement_id, placement.digest, name, _REVISION, name,
            self._snapshot.snapshot_id, self._snapshot.digest, regions, tuple(self._ranges(rank)),
        )  # fmt: skip

    def _ranges(self, rank: Rank) -> Iterator[Any]:
        layout, tokens = rank.layout, self._problem.tokens
        head_nbytes = layout.head_size * DATA_TYPE.itemsize
        # the strides of one alone are 0 with us
        strides = (
            layout.stride("N") or layout.heads.count * head_nbytes,
            layout.stride("H") or head_nbytes,
        )
        for place, layer in enumerate(layout.layers):
            for kv, component in enumerate(_COMPONENTS):
                for block, start, stop in _held(rank, tokens, self._problem.is_scattered):
                    inside = start % layout.block_tokens
                    yield mk.KVCacheResolvedRange(
                        layer, component, start, stop - start, layout.heads.first,
                        layout.heads.count, f"{layout.tensor(place, kv):04}",
                        block * layout.stride("B") + inside * strides[0], *strides,
                    )  # fmt: skip


def _held(rank: Rank, tokens: range, is_scattered: bool) -> Iterator[tuple[int, int, int]]:
    """The tokens of each block, or of all of them where they are one piece of memory."""
    size = rank.layout.block_tokens
    if not is_scattered:
        yield rank.blocks[0], tokens.start, tokens.stop
        return
    for number, block in enumerate(rank.blocks, tokens.start // size):
        yield block, max(tokens.start, number * size), min(tokens.stop, (number + 1) * size)


def _edges(logical: Any) -> Iterator[Edge]:
    for edge in logical.edges:
        source = int(edge.source_participant_id.split()[1])
        for head in range(edge.head_count):
            yield Edge(
                source, edge.global_layer_id, edge.global_head_start + head,
                edge.source_head_offset + head, edge.target_head_offset + head,
            )  # fmt: skip


def _name(end: str, rank: Rank) -> str:
    return f"{end} {rank.index:03}"
