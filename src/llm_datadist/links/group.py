"""A group: one rank-table link, and how far it has come. Spec 5.8."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.transport.same_host import SameHost
from llm_datadist.types import RegisterMemStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_datadist.endpoint import Endpoint
    from llm_datadist.links.session import Session
    from llm_datadist.transport.same_host import Address, Process


class GroupPlan(NamedTuple):
    """What `link` asks for."""

    name: str  #: core.rank_table.group_name
    members: Mapping[int, Sequence[Endpoint]]  #: the others: where the rank table says they are
    total_s: float
    retries: int
    #: why nobody can call us at an address of the table; empty when they can
    deafness: str = ""


@dataclass(eq=False)
class Group:
    """One rank-table link; changed in the loop's thread only."""

    plan: GroupPlan
    status: RegisterMemStatus = RegisterMemStatus.PREPARING
    sessions: dict[int, Session] = field(default_factory=dict)
    #: whom we have reached with a call of ours, where, and which process that is if it is known
    calling: dict[tuple[int, Address], Process | None] = field(default_factory=dict)
    #: of calls that we answered, by whose they are: who looks for others may call more than once
    answered: dict[int, list[Session]] = field(default_factory=dict)
    #: why the last calls to a member failed, by where they went
    failures: dict[int, dict[Address, str]] = field(default_factory=dict)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def missing(self) -> list[int]:
        """The members that are not linked yet."""
        return [member for member in self.plan.members if member not in self.sessions]

    def claim(self, member: int, at: Address, process: Process | None) -> str:
        """A call of ours reached a member: empty when it counts, else why it is to end there.

        Not before: the member's own call may be the only one that can get through.
        """
        if any(not session.is_closed for session in self.answered.get(member, ())):
            return "it is calling us"
        self.calling[member, at] = process
        return ""

    def answer(self, caller: int, session: Session) -> None:
        """A call is being answered."""
        others = [each for each in self.answered.get(caller, ()) if not each.is_closed]
        self.answered[caller] = [*others, session]

    def is_calling(self, member: int, process: Process | None) -> bool:
        """Whether a call of ours goes on that reached the member, who is that process.

        Others on this host can be where a member was to be met.
        """
        return any(
            called == member and (process is None or reached in (None, process))
            for (called, _), reached in self.calling.items()
        )

    def settle(self, status: RegisterMemStatus) -> None:
        """The end of the preparation."""
        self.status = status
        self.settled.set()

    def absences(self) -> str:
        """Who is missing, where it was looked for, and what could be mended."""
        absent = "; ".join(self._absence(each, self.plan.members[each]) for each in self.missing)
        deafness = f" {self.plan.deafness}." if self.plan.deafness else ""
        return (
            f"{absent}.{deafness} Of two members the one that calls `link` last must be able to "
            "reach the other, or link_retry_count be more than 1"
        )

    def _absence(self, member: int, places: Sequence[Endpoint]) -> str:
        where = ", ".join(["this host", *map(str, places)])
        if not places:
            where += (
                " only, for the rank table has no host_ip, no server_id that is an IP address and "
                "no device_ip for it"
            )
        failures = "; ".join(self._failures_of(member))
        return f"cluster {member} (looked for on {where}{f': {failures}' if failures else ''})"

    def _failures_of(self, member: int) -> list[str]:
        """Why it was not reached: one reason for all places of this host, which may be many."""
        failures = self.failures.get(member, {})
        met = [reason for at, reason in failures.items() if isinstance(at, SameHost)]
        others = [reason for at, reason in failures.items() if not isinstance(at, SameHost)]
        if len(met) > 1:
            met = [f"{met[0]}; nor at {len(met) - 1} other meeting points of that name"]
        return list(dict.fromkeys([*met, *others]))
