"""What the others refuse and we plan: both are asked, and what each says is told."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from planners import by_us
from planners.problem import Engine, Model, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Refusal(NamedTuple):
    """One problem, as both see it."""

    what: str
    #: empty: they planned it after all
    said: str
    #: by us, for all destinations
    num_segments: int


def by_vllm() -> Iterator[Refusal]:
    """By the arithmetic that its connector begins with."""
    from planners import by_vllm as theirs

    model, order = Model(2, 6, 8), theirs.ORDER
    tokens = range(32)
    for what, problem in (
        ("TP 3 to 2", Problem(model, Engine(3), Engine(2), order, tokens)),
        ("blocks of 32 to 16", Problem(model, Engine(2, 1, 32), Engine(2), order, tokens)),
        ("blocks of 16 to 24", Problem(model, Engine(2), Engine(2, 1, 24), order, tokens)),
        ("TP 6 to 2, blocks of 8 to 16", Problem(model, Engine(6, 1, 8), Engine(2), order, tokens)),
    ):
        yield _asked(what, problem, lambda p: theirs.plan(p, p.destinations[0]))


def by_mooncake() -> Iterator[Refusal]:
    """By its planner, with its own limits."""
    from mooncake.reshard.kv_cache import KVCacheLayout

    from planners.by_mooncake import Planner

    model, tokens = Model(2, 8, 8), range(32)
    whole = Problem(model, Engine(4), Engine(2), "BNHD", tokens)
    yield _asked(
        "pages of 16 to 64", replace(whole, dst=Engine(2, 1, 64)), lambda p: Planner(p).plans()
    )
    yield _asked("HND, by its strides", replace(whole, order="BHND"), lambda p: Planner(p).plans())
    yield _asked("HND, by name", replace(whole, order="BHND"), lambda _: KVCacheLayout("hnd"))
    latent = replace(whole, model=Model(2, 0, 8), order="BND")
    yield _asked("a latent cache", latent, lambda p: Planner(p).plans())
    long = Problem(Model(80, 8, 128), Engine(8), Engine(4), "BNHD", range(2048))
    yield _asked("2,048 tokens of Llama-3-70B", long, lambda p: Planner(p).plans())


def _asked(what: str, problem: Problem, plan: Callable[[Problem], object]) -> Refusal:
    said = ""
    try:
        plan(problem)
    except (AssertionError, ValueError) as error:
        said = str(error)
    count = sum(
        len(segments)
        for rank in problem.destinations
        for segments in by_us.segments_of(problem, problem.sources, rank)
    )
    return Refusal(what, said, count)
