"""Groups: the links that a rank table makes, all members calling on their own. Spec 5.8, 12.1-12.3.

Every member publishes itself and calls each of the others once at first: whoever comes second finds
the first, so nobody waits for anybody. When two call each other at the same time the call of the
smaller cluster id wins. A group becomes usable as a whole, when the last of its links is made.
"""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.endpoint import Endpoint
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.locks import make_lock
from llm_datadist.observe.log import get_logger
from llm_datadist.running.deadline import Deadline
from llm_datadist.types import RegisterMemStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_datadist.core import messages as m
    from llm_datadist.links.linker import Linker, Outcome
    from llm_datadist.links.rendezvous import Rendezvous
    from llm_datadist.links.session import Session
    from llm_datadist.links.table import LinkTable

MAX_GROUPS = 512
_DEFAULT_TOTAL_S = 120
_CALL_S = 10.0
#: between calls to a member that is just calling us
_BUSY_S = 0.05


class GroupPlan(NamedTuple):
    """What `link` asks for."""

    name: str  #: core.rank_table.group_name
    members: Mapping[int, Sequence[Endpoint]]  #: the others: where they may be on other hosts
    total_s: float
    retries: int


@dataclass(eq=False)
class Group:
    """One rank-table link; changed in the loop's thread only."""

    plan: GroupPlan
    token: str  #: of what the rendezvous says of us
    status: RegisterMemStatus = RegisterMemStatus.PREPARING
    sessions: dict[int, Session] = field(default_factory=dict)
    #: whom we have reached with a call of ours
    calling: set[int] = field(default_factory=set)
    #: whose call we answered last
    answered: dict[int, Session] = field(default_factory=dict)
    #: why the last call to a member failed
    failures: dict[int, str] = field(default_factory=dict)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def missing(self) -> list[int]:
        """The members that are not linked yet."""
        return [member for member in self.plan.members if member not in self.sessions]

    def claim(self, member: int) -> str:
        """A call of ours reached a member: empty when it counts, else why it is to end there.

        Not before: the member's own call may be the only one that can get through.
        """
        answered = self.answered.get(member)
        if answered is not None and not answered.is_closed:
            return "it is calling us"
        self.calling.add(member)
        return ""


class Groups:
    """The rank-table links of a cluster. `status_of` is for any thread, all else for the loop's."""

    def __init__(self, cluster_id: int, links: LinkTable) -> None:
        self._cluster_id = cluster_id
        self._links = links
        self._lock = make_lock()
        self._groups: dict[int, Group] = {}
        self._ids = itertools.count(1)

    async def start(
        self, plan: GroupPlan, linker: Linker, rendezvous: Rendezvous, port: int
    ) -> int:
        """Begins to link; the comm_id, at once. Raises LLMException(LLM_PARAM_INVALID)."""
        if len(self._groups) >= MAX_GROUPS:
            raise invalid(f"{MAX_GROUPS} rank-table links are outstanding: unlink some")
        token = rendezvous.publish(plan.name, self._cluster_id, port)
        group, comm_id = Group(plan, token), next(self._ids)
        with self._lock:
            self._groups[comm_id] = group
        group.task = asyncio.get_running_loop().create_task(
            self._prepare(group, linker, rendezvous)
        )
        return comm_id

    def status_of(self, comm_id: int) -> RegisterMemStatus:
        """Never blocks. Raises LLMException(LLM_NOT_YET_LINK) for an id that is not known."""
        with self._lock:
            return self._find(comm_id).status

    def find(self, comm_id: int) -> Group:
        with self._lock:
            return self._find(comm_id)

    async def stop(self, comm_id: int) -> None:
        """Ends a group's links, or its preparation, and forgets it."""
        with self._lock:
            group = self._groups.pop(comm_id, None)
        if group is not None:
            await self._end(group, "it was unlinked")

    async def close(self) -> None:
        for comm_id in list(self._groups):
            await self.stop(comm_id)

    def refusal_of(self, hello: m.Hello) -> tuple[LLMStatusCode, str] | None:
        """Why a call to a group of ours is not answered now, if so."""
        group = self._open_group(hello.group)
        caller = hello.cluster_id
        if group is None or caller not in group.plan.members:
            return LLMStatusCode.LLM_LINK_FAILED, (
                f"cluster {self._cluster_id} is not linking by such a rank table now"
            )
        if caller in group.sessions:
            return LLMStatusCode.LLM_ALREADY_LINK, "the two are linked by this rank table already"
        if caller in group.calling and self._cluster_id < caller:
            return LLMStatusCode.LLM_PROCESSING_LINK, (
                f"cluster {self._cluster_id} is calling cluster {caller} itself"
            )
        return None

    def answer(self, session: Session, caller: int) -> None:
        """A call that was not refused is being answered."""
        group = self._open_group(session.group)
        if group is not None:
            group.answered[caller] = session

    async def join(self, session: Session) -> None:
        """A link of a group is made. The group becomes usable with the last."""
        group = self._open_group(session.group)
        if group is None or session.cluster_id not in group.missing:
            await session.cut("its rank-table link is not being made any more")
            return
        group.sessions[session.cluster_id] = session
        if len(group.sessions) == len(group.plan.members):
            for member in group.sessions.values():
                for stale in self._links.add(member):
                    await stale.cut(f"cluster {member.cluster_id} linked anew")
                member.report()
            self._settle(group, RegisterMemStatus.OK)

    def leave(self, session: Session) -> None:
        """A link of a group ended; one that is still being made has failed then."""
        group = self._open_group(session.group)
        if group is not None and group.sessions.get(session.cluster_id) is session:
            self._fail(group, f"cluster {session.cluster_id} was lost while linking")

    async def _prepare(self, group: Group, linker: Linker, rendezvous: Rendezvous) -> None:
        plan = group.plan
        total_s = plan.total_s or _DEFAULT_TOTAL_S
        try:
            for _ in range(plan.retries):
                await self._try(group, linker, rendezvous, total_s / plan.retries)
                if group.settled.is_set():
                    break
            else:
                self._fail(group, f"not all members appeared within {total_s} s: {_absent(group)}")
        except Exception as error:  # whatever it is, nobody must wait for this group
            self._fail(group, f"{type(error).__name__}: {error}")
            raise
        finally:
            rendezvous.withdraw(plan.name, self._cluster_id, group.token)
        if group.status is RegisterMemStatus.FAILED:
            await self._end(group, "its rank-table link failed")

    async def _try(
        self, group: Group, linker: Linker, rendezvous: Rendezvous, timeout_s: float
    ) -> None:
        """Calls those who are missing, and gives those who come later the rest of the time."""
        deadline = Deadline.after(timeout_s)
        calls = [
            self._call(group, each, linker, rendezvous, Deadline.after(min(timeout_s, _CALL_S)))
            for each in group.missing
        ]
        await asyncio.gather(*calls)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(group.settled.wait(), max(0.0, deadline.remaining_s()))

    async def _call(
        self,
        group: Group,
        member: int,
        linker: Linker,
        rendezvous: Rendezvous,
        deadline: Deadline,
    ) -> None:
        """Tries to reach a member that may not be there yet, in which case it will call us."""
        port = rendezvous.find(group.plan.name, member)
        here = [] if port is None else [Endpoint("127.0.0.1", port)]
        for endpoint in (*here, *group.plan.members[member]):
            if deadline.remaining_s() <= 0:
                return
            outcome = await self._call_until_answered(group, member, endpoint, linker, deadline)
            get_logger().info("calling cluster %d at %s: %s", member, endpoint, outcome.status)
            group.failures[member] = outcome.reason
            if member in group.sessions or group.settled.is_set():
                return

    async def _call_until_answered(
        self, group: Group, member: int, endpoint: Endpoint, linker: Linker, deadline: Deadline
    ) -> Outcome:
        while True:
            left_s = max(0.001, deadline.remaining_s())
            claim, name = partial(group.claim, member), group.plan.name
            try:
                outcome = await linker.call(
                    endpoint, left_s, is_fresh=True, group=name, claim=claim
                )
            finally:
                group.calling.discard(member)
            busy = outcome.status is LLMStatusCode.LLM_PROCESSING_LINK
            if not busy or member in group.sessions or deadline.remaining_s() < _BUSY_S:
                return outcome
            await asyncio.sleep(_BUSY_S)

    def _open_group(self, name: str) -> Group | None:
        """The group of that name that is being made."""
        with self._lock:
            for group in self._groups.values():
                if group.plan.name == name and group.status is RegisterMemStatus.PREPARING:
                    return group
        return None

    def _find(self, comm_id: int) -> Group:
        group = self._groups.get(comm_id)
        if group is None:
            raise LLMException(
                f"there is no rank-table link with comm_id {comm_id}",
                LLMStatusCode.LLM_NOT_YET_LINK,
            )
        return group

    def _settle(self, group: Group, status: RegisterMemStatus) -> None:
        group.status = status
        group.settled.set()

    def _fail(self, group: Group, reason: str) -> None:
        get_logger().error("cluster %d: rank-table link failed: %s", self._cluster_id, reason)
        self._settle(group, RegisterMemStatus.FAILED)

    async def _end(self, group: Group, reason: str) -> None:
        if group.status is RegisterMemStatus.PREPARING:
            self._settle(group, RegisterMemStatus.FAILED)
        task = group.task
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for session in list(group.sessions.values()):
            await session.cut(reason)


def _absent(group: Group) -> str:
    def says(member: int, places: Sequence[Endpoint]) -> str:
        where = ", ".join(map(str, places)) or (
            "this host only, for the rank table has no host_ip, no server_id that is an IP "
            "address and no device_ip for it"
        )
        failure = group.failures.get(member)
        return f"cluster {member} (looked for on {where}{f': {failure}' if failure else ''})"

    absent = "; ".join(says(each, group.plan.members[each]) for each in group.missing)
    return (
        f"{absent}. Of two members the one that calls `link` last must be able to reach the other, "
        "or link_retry_count be more than 1"
    )
