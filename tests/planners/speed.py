"""How long planning takes: beside Mooncake's planner, and at a size that only ours reaches."""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist import reshard
from llm_datadist.core.reshard import MOST_SEGMENTS
from planners import by_us
from planners.plans import merged
from planners.problem import Engine, Model, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llm_datadist.core.segments import Segments
    from planners.by_mooncake import Planner

_LLAMA_3_70B = Model(num_layers=80, num_heads=8, head_size=128)
_LONG = range(128 * 1024)


class Contest(NamedTuple):
    """The same problem, planned by both."""

    what: str
    num_segments: int
    our_s: float
    their_s: float
    #: median of the rounds' ratios
    ratio: float


class Size(NamedTuple):
    """What one destination's plan of a long request takes, by windows."""

    what: str
    num_segments: int
    seconds: float
    peak_nbytes: int

    @property
    def ns_per_segment(self) -> float:
        """Of planning alone."""
        return self.seconds / self.num_segments * 1e9


def beside_mooncake(rounds: int) -> Iterator[Contest]:
    """All destinations' plans of Llama-3-70B from TP8 to TP4 in NHD, the one order it has.

    768 tokens are as many as its limits allow, a million writes. What both make once for two
    engines, and what it is told about memory, is made before.
    """
    from planners.by_mooncake import Planner

    for what, is_scattered in (("scattered pages of 16", True), ("one run of pages", False)):
        problem = Problem(
            _LLAMA_3_70B, Engine(8), Engine(4), "BNHD", range(768), is_scattered=is_scattered
        )
        theirs = Planner(problem)
        moves = [move for part in _ours(problem) for move in zip(*part.lists, strict=True)]
        writes = [(w.source_address, w.target_address, w.nbytes) for w in theirs.writes()]
        assert merged(moves) == merged(writes), "these are not the same plans"
        pairs = [_raced(problem, theirs) for _ in range(rounds)]
        our_s, their_s = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(there / here for here, there in pairs)
        yield Contest(what, len(moves), our_s, their_s, ratio)


def of_long_requests(rounds: int) -> list[Size]:
    """128 k tokens into one destination in HND: resharded, and between equal layouts."""
    split = Problem(_LLAMA_3_70B, Engine(8), Engine(4, 1, 64), "BHND", _LONG)
    equal = replace(split, dst=Engine(8))
    ends = [_long(split), _long(equal)]
    times = [[_timed(end) for end in ends] for _ in range(rounds)]
    return [
        Size(what, end(), statistics.median(seconds), _peak_nbytes(end))
        for what, end, seconds in zip(
            ("TP8 to TP4, blocks of 16 to 64", "equal layouts, blocks of 16"),
            ends, zip(*times, strict=True), strict=True,
        )
    ]  # fmt: skip


def of_layouts(rounds: int) -> tuple[float, float]:
    """Seconds to compare the layouts of TP8 with one of TP4, and to do so again."""
    problem = Problem(_LLAMA_3_70B, Engine(8), Engine(4, 1, 64), "BHND", range(64))
    destination = problem.destinations[0].layout
    firsts, seconds = [], []
    for number in range(rounds):  # layouts that were not compared before
        layouts = [
            replace(rank.layout, num_blocks=100 + number, strides=()) for rank in problem.sources
        ]
        compare = partial(reshard, layouts, destination)
        firsts.append(_timed(compare))
        seconds.append(_timed(compare))
    return statistics.median(firsts), statistics.median(seconds)


def _raced(problem: Problem, theirs: Planner) -> tuple[float, float]:
    """One round: our seconds, and theirs."""
    return _timed(lambda: _ours(problem)), _timed(theirs.writes)


def _ours(problem: Problem) -> list[Segments]:
    return [
        segments
        for rank in problem.destinations
        for segments in by_us.segments_of(problem, problem.sources, rank)
    ]


def _long(problem: Problem) -> Callable[[], int]:
    """Plans what the first destination reads, window by window; says how many segments."""
    destination = problem.destinations[0]
    patterns = reshard([rank.layout for rank in problem.sources], destination.layout)

    def run() -> int:
        return sum(
            len(window)
            for pattern in patterns
            for source in [problem.sources[pattern.source]]
            for window in pattern.windows(
                source.blocks, destination.blocks, problem.tokens, source.addrs, destination.addrs,
                count=MOST_SEGMENTS,
            )
        )  # fmt: skip

    return run


def _timed(call: Callable[[], object]) -> float:
    """Without the collector, which costs those most who make most objects."""
    gc.collect()
    gc.disable()
    try:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    finally:
        gc.enable()


def _peak_nbytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
