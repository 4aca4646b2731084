"""Grids of problems, our plan of each beside another planner's, and what was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Final

from planners import by_us
from planners.plans import Edge, Plan, spans
from planners.problem import Engine, Model, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planners.problem import Rank

_SIZES: Final = (1, 2, 4, 8)
_LAYERS: Final = 4


@dataclass
class Tally:
    """What agreed, and what did not."""

    problems: int = 0
    destinations: int = 0
    heads: int = 0
    nbytes: int = 0
    #: destinations of which we read other ranks, with the same heads, unless their ranks come first
    other_replicas: int = 0
    disagreements: list[str] = field(default_factory=list)

    def compare(self, problem: Problem, destination: Rank, theirs: Plan) -> None:
        """Ranks, heads and bytes of one destination."""
        where = f"{problem}, destination {destination.index}"
        ours = by_us.plan(problem, destination, preferred=theirs.sources)
        for what, is_same in (
            ("ranks", ours.sources == theirs.sources),
            ("heads", ours.edges == theirs.edges),
            ("bytes", _same_bytes(problem, ours, theirs)),
        ):
            if not is_same:
                self.disagreements.append(f"{what}: {where}")
        self.destinations += 1
        self.heads += len(ours.edges)
        self.nbytes += sum(nbytes for _, _, nbytes in ours.moves)
        unasked = by_us.plan(problem, destination)
        if _places(unasked) != _places(theirs):
            self.disagreements.append(f"heads, left to choose the ranks: {where}")
        self.other_replicas += unasked.sources != theirs.sources


def _places(plan: Plan) -> set[Edge]:
    """Where heads lie, whoever has them: ranks that hold the same hold it alike."""
    return {edge._replace(source=0) for edge in plan.edges}


def _same_bytes(problem: Problem, ours: Plan, theirs: Plan) -> bool:
    if problem.src.block_tokens == problem.dst.block_tokens:
        return ours.moves == theirs.moves
    # vLLM reads into the right blocks, and orders what is inside them afterwards
    return all(spans(ours.moves, end) == spans(theirs.moves, end) for end in (0, 1))


def against_mooncake() -> Tally:
    """Tensor- and pipeline-parallel sizes, heads, pages, and requests that begin in one."""
    from planners.by_mooncake import Planner

    tally = Tally()
    for problem in _mooncake_problems():
        tally.problems += 1
        for rank, theirs in zip(problem.destinations, Planner(problem).plans(), strict=True):
            tally.compare(problem, rank, theirs)
    return tally


def against_vllm() -> Tally:
    """Tensor-parallel sizes, heads and block sizes, latent caches; what its mapping is made for."""
    from planners import by_vllm

    tally = Tally()
    for problem in _vllm_problems(by_vllm.ORDER, by_vllm.LATENT_ORDER):
        tally.problems += 1
        for rank in problem.destinations:
            tally.compare(problem, rank, by_vllm.plan(problem, rank))
    return tally


def _mooncake_problems() -> Iterator[Problem]:
    powers = product(_SIZES, _SIZES, _SIZES)
    sixths = product([1, 2, 3, 6], [1, 2, 3, 6], [6, 12])
    requests = [(4, range(23)), (16, range(5, 70)), (16, range(64))]
    for (src, dst, heads), pps, (page, tokens) in product(
        [*powers, *sixths], product([1, 2], repeat=2), requests
    ):
        here, there = (Engine(tp, pp, page) for tp, pp in zip((src, dst), pps, strict=True))
        yield Problem(Model(_LAYERS, heads, 8), here, there, "BNHD", tokens)


def _vllm_problems(order: str, latent_order: str) -> Iterator[Problem]:
    for src, dst, heads, (theirs, ours), count in product(
        _SIZES, _SIZES, [0, *_SIZES], [(16, 16), (8, 16), (16, 64)], [1, 3]
    ):
        if theirs != ours and src > dst and heads:
            continue  # refused: refusals.py
        yield Problem(
            Model(_LAYERS, heads, 8), Engine(src, 1, theirs), Engine(dst, 1, ours),
            order if heads else latent_order, range(count * ours),
        )  # fmt: skip
