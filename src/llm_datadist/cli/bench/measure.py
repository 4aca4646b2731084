"""Measuring in alternation: each round, everyone moves the workload; only rounds are compared."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_datadist.cli.bench.failure import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_datadist.cli.bench.contestant import Job
    from llm_datadist.cli.bench.lineup import Entrant

#: a round of short moves lasts at least so long
_ROUND_S = 0.05
_MOST_REPEATS = 1000


@dataclass(frozen=True)
class Result:
    """How one contestant did."""

    name: str
    detail: str
    job: Job
    rounds_s: list[float]  #: the median move of each round

    @property
    def median_s(self) -> float:
        return statistics.median(self.rounds_s)

    @property
    def best_s(self) -> float:
        return min(self.rounds_s)

    @property
    def gb_per_s(self) -> float:
        return self.job.workload.moved_nbytes / self.median_s / 1e9

    def times_as_fast_as(self, other: Result) -> float:
        """The median over the rounds of this one's speed to the other's."""
        return statistics.median(
            theirs / mine for mine, theirs in zip(self.rounds_s, other.rounds_s, strict=True)
        )


def compete(entrants: Sequence[Entrant], rounds: int, show: Callable[[str], None]) -> list[Result]:
    """Runs the rounds. Raises BenchError, also when bytes did not arrive as they were."""
    with ExitStack() as stack:
        pairs = []
        for entrant in entrants:
            show(f"starting {entrant.name}")
            pairs.append(stack.enter_context(entrant.start()))
        for pair in pairs:
            show(f"verifying {pair.name}")
            if not pair.is_honest():
                raise BenchError(f"{pair.name} did not move the bytes that it was asked to")
        repeats = [_repeats(pair.measure(3)) for pair in pairs]
        medians: list[list[float]] = [[] for _ in pairs]
        for number in range(rounds):
            for index, pair in enumerate(pairs):
                show(f"round {number + 1} of {rounds}: {pair.name}")
                medians[index].append(statistics.median(pair.measure(repeats[index])))
        return [
            Result(pair.name, pair.detail, entrant.job, rounds_s)
            for pair, entrant, rounds_s in zip(pairs, entrants, medians, strict=True)
        ]


def _repeats(seconds: Sequence[float]) -> int:
    return max(1, min(_MOST_REPEATS, int(_ROUND_S / statistics.median(seconds))))
