"""A contest: this library and what `--vs` names, measured in alternation.

Each round, everyone moves the workload; only rounds are compared.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llm_datadist.cli.bench.contestant import Contestant, Job, Pair
from llm_datadist.cli.bench.ours import Ours
from llm_datadist.cli.bench.rivals import Memcpy, Mooncake, Nixl, RawReads, RawSockets
from llm_datadist.cli.failure import CommandError, SetupError
from llm_datadist.cli.kernel_files import free_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_datadist.cli.bench.workload import Workload

#: a round of short moves lasts at least so long
_ROUND_S = 0.05
_MOST_REPEATS = 1000

OURS = "llm_datadist"
RIVALS = ("memcpy", "readv", "socket", "two-sided", "verified", "nixl", "mooncake")

_INSTALL = {
    "verified": ("xxhash", "pip install xxhash"),
    "nixl": ("nixl_cu12", "pip install --no-deps nixl-cu12, beside torch"),
    "mooncake": (
        "mooncake",
        "pip install mooncake-transfer-engine-non-cuda, and Debian's libibverbs1 libnuma1 "
        "librdmacm1 libcurl4 liburing2",
    ),
}


@dataclass(frozen=True)
class Entrant:
    """A contestant that has not been started."""

    name: str
    make: Callable[[Job], Contestant]
    job: Job
    env: dict[str, str] = field(default_factory=dict)

    def start(self) -> Pair:
        return Pair(self.name, self.make, self.job, self.env)


def line_up(job: Job, rivals: list[str]) -> list[Entrant]:
    """This library first, then the rivals. Raises SetupError for one that is not here."""
    entrants = [Entrant(OURS, Ours, job)]
    for rival in rivals:
        entrants += _entrants_of(rival, job)
    return entrants


def _entrants_of(rival: str, job: Job) -> list[Entrant]:
    if rival in _INSTALL:
        module, advice = _INSTALL[rival]
        if find_spec(module) is None:
            raise SetupError(f"--vs {rival}: it is not installed ({advice})")
    if rival == "two-sided":
        return [Entrant("ours two-sided", Ours, replace(job, is_accessible=False))]
    if rival == "verified":
        return [Entrant("ours verified", Ours, replace(job, verifies=True))]
    if rival == "memcpy":
        return [Entrant(f"memcpy x{job.threads}", Memcpy, job)]
    if rival == "readv":
        return [Entrant(f"readv x{job.threads}", RawReads, job)]
    if rival == "socket":
        return [Entrant(f"sockets x{job.threads}", RawSockets, job)]
    if rival == "mooncake":
        return [Entrant("mooncake tcp", Mooncake, job)]
    if rival == "nixl":
        return _nixls(job)
    raise SetupError(f"--vs {rival}: choose from {', '.join(RIVALS)}")


def _nixls(job: Job) -> list[Entrant]:
    """NIXL without and with threads of its own, of which the better one counts."""
    env = {"NIXL_LOG_LEVEL": "ERROR"}
    if job.path == "tcp":
        env["UCX_TLS"] = "tcp,self"
    tag = "nixl tcp" if job.path == "tcp" else "nixl"
    return [
        Entrant(
            tag if not threads else f"{tag} x{threads}", Nixl, replace(job, threads=threads), env
        )
        for threads in dict.fromkeys((0, job.threads))
    ]


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
    """Runs the rounds. Raises CommandError, also when bytes did not arrive as they were."""
    _require_memory([entrant.job.workload for entrant in entrants])
    with ExitStack() as stack:
        pairs = []
        for entrant in entrants:
            show(f"starting {entrant.name}")
            pairs.append(stack.enter_context(entrant.start()))
        for pair in pairs:
            show(f"verifying {pair.name}")
            if not pair.is_honest():
                raise CommandError(f"{pair.name} did not move the bytes that it was asked to")
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


def _require_memory(workloads: Sequence[Workload]) -> None:
    """All contestants have a cache at both ends, and one more is what verifying takes."""
    largest = max(workload.cache_nbytes for workload in workloads)
    needed = sum(2 * each.cache_nbytes + each.vector_nbytes for each in workloads) + largest
    require_memory(needed, "take fewer or smaller --blocks, or --vs none")


def require_memory(needed: int, remedy: str) -> None:
    """Raises SetupError where there is less."""
    free, _is_container = free_nbytes()
    if needed > free:
        gib = f"{needed / 2**30:,.1f} GiB"
        raise SetupError(f"it takes {gib} of memory, {free / 2**30:,.1f} are free: {remedy}")


def _repeats(seconds: Sequence[float]) -> int:
    return max(1, min(_MOST_REPEATS, int(_ROUND_S / statistics.median(seconds))))
