"""Who takes part: this library, and what `--vs` names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llm_datadist.cli.bench.ceiling import Memcpy, RawReads, RawSockets
from llm_datadist.cli.bench.contestant import Contestant, Job, Pair
from llm_datadist.cli.bench.failure import SetupError
from llm_datadist.cli.bench.ours import Ours
from llm_datadist.cli.bench.peers import Mooncake, Nixl

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = "llm_datadist"
RIVALS = ("memcpy", "readv", "socket", "two-sided", "verified", "nixl", "mooncake")

_INSTALL = {
    "verified": ("xxhash", "pip install 'llm-datadist[integrity]'"),
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
