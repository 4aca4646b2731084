"""All cases of the soak tests, and how many rounds each runs: in CI, and in a long run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from soak.churn import churn
from soak.cuts import cuts
from soak.deaths import kill_owner, kill_puller, restarts, stop_and_continue
from soak.endings import finalizes, forks, interruptions, revoked_pushes, scarce_threads
from soak.mixture import mixture
from soak.resources import link_cycles, many_links, small_pulls

if TYPE_CHECKING:
    from collections.abc import Callable

    from soak.tally import Tally


class Case(NamedTuple):
    """A case; its rounds are seconds where `unit` says so."""

    name: str
    function: Callable[[int, Tally], None]
    short: int
    long: int
    unit: str = "rounds"


CASES = [
    Case("kill_owner", kill_owner, short=1, long=600),
    Case("kill_puller", kill_puller, short=1, long=600),
    Case("stop_and_continue", stop_and_continue, short=1, long=30),
    Case("restarts", restarts, short=1, long=20),
    Case("churn", churn, short=20, long=10_000),
    Case("cuts", cuts, short=8, long=1_000),
    Case("many_links", many_links, short=1, long=1),
    Case("link_cycles", link_cycles, short=50, long=10_000),
    Case("small_pulls", small_pulls, short=2_000, long=1_000_000),
    Case("interruptions", interruptions, short=200, long=10_000),
    Case("scarce_threads", scarce_threads, short=4, long=1_000),
    Case("forks", forks, short=10, long=1_000),
    Case("finalizes", finalizes, short=10, long=1_000),
    Case("revoked_pushes", revoked_pushes, short=6, long=1_000),
    Case("mixture", mixture, short=2, long=60, unit="seconds"),
]
