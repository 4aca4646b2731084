"""Our plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist import reshard
from planners.plans import Edge, Plan, merged

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.core.pattern import Pattern
    from llm_datadist.core.segments import Segments
    from planners.problem import Problem, Rank


def plan(problem: Problem, destination: Rank, preferred: Sequence[int] = ()) -> Plan:
    """What one destination reads. Of ranks that hold the same, it takes the preferred ones."""
    sources = sorted(problem.sources, key=lambda rank: rank.index not in preferred)
    patterns = reshard([rank.layout for rank in sources], destination.layout)
    moves = [
        move
        for segments in segments_of(problem, sources, destination)
        for move in zip(*segments.lists, strict=True)
    ]
    edges = frozenset(
        edge
        for pattern in patterns
        for edge in _edges(pattern, sources[pattern.source].index, destination)
    )
    return Plan(edges, merged(moves))


def segments_of(problem: Problem, sources: Sequence[Rank], destination: Rank) -> Iterator[Segments]:
    """What is to be copied, of one source after the other."""
    for pattern in reshard([rank.layout for rank in sources], destination.layout):
        source = sources[pattern.source]
        yield pattern.segments(
            source.blocks, destination.blocks, problem.tokens, source.addrs, destination.addrs
        )


def _edges(pattern: Pattern, source: int, destination: Rank) -> Iterator[Edge]:
    run, first = pattern.heads, destination.layout.heads.first
    for place in pattern.dst_layers:
        layer = destination.layout.layers[place]
        assert isinstance(layer, int)
        for head in range(run.num_heads):
            yield Edge(source, layer, first + run.dst + head, run.src + head, run.dst + head)
