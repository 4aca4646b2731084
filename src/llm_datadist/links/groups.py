"""Groups: the links that a rank table makes, all members calling on their own. Spec 5.8, 12.1-12.3.

When two members call each other at the same time the call of the smaller cluster id wins. A group
becomes usable as a whole, when the last of its links is made.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import TYPE_CHECKING

from llm_datadist.core.rank_table import link_of, may_be_one
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.links.group import Group
from llm_datadist.links.preparing import prepare
from llm_datadist.locks import make_lock
from llm_datadist.observe.log import get_logger
from llm_datadist.types import RegisterMemStatus

if TYPE_CHECKING:
    from llm_datadist.core import messages as m
    from llm_datadist.links.group import GroupPlan
    from llm_datadist.links.linker import Linker
    from llm_datadist.links.session import Session
    from llm_datadist.links.table import LinkTable
    from llm_datadist.transport.same_host import Process

MAX_GROUPS = 512


class Groups:
    """The rank-table links of a cluster. `status_of` is for any thread, all else for the loop's."""

    def __init__(self, cluster_id: int, links: LinkTable, *, is_secure: bool) -> None:
        """`is_secure` says that members prove who they are."""
        self._cluster_id = cluster_id
        self._is_secure = is_secure
        self._links = links
        self._lock = make_lock()
        self._groups: dict[int, Group] = {}
        self._ids = itertools.count(1)

    def start(self, plan: GroupPlan, linker: Linker) -> int:
        """Begins to link; the comm_id, at once. Raises LLMException(LLM_PARAM_INVALID)."""
        if len(self._groups) >= MAX_GROUPS:
            raise invalid(f"{MAX_GROUPS} rank-table links are outstanding: unlink some")
        group, comm_id = Group(plan), next(self._ids)
        with self._lock:
            self._groups[comm_id] = group
        group.task = asyncio.get_running_loop().create_task(self._prepare(group, linker))
        return comm_id

    def has_link(self, name: str) -> bool:
        """Whether there is a group of that name, whatever its rank table says."""
        return any(link_of(group.plan.name) == link_of(name) for group in self._groups.values())

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

    def refusal_of(
        self, hello: m.Hello, process: Process | None
    ) -> tuple[LLMStatusCode, str] | None:
        """Why a call to a group of ours is not answered now, if so."""
        group = self._open_group(hello.group)
        caller = hello.cluster_id
        if group is None or caller not in group.plan.members:
            return LLMStatusCode.LLM_LINK_FAILED, (
                f"cluster {self._cluster_id} is not linking by such a rank table now"
            )
        if caller in group.sessions:
            return LLMStatusCode.LLM_ALREADY_LINK, "the two are linked by this rank table already"
        if group.is_calling(caller, process) and self._cluster_id < caller:
            return LLMStatusCode.LLM_PROCESSING_LINK, (
                f"cluster {self._cluster_id} is calling cluster {caller} itself"
            )
        return None

    def answer(self, session: Session, caller: int) -> None:
        """A call that was not refused is being answered."""
        group = self._open_group(session.group)
        if group is not None:
            group.answer(caller, session)
            session.group = group.plan.name  # the caller's table may say something else

    async def join(self, session: Session) -> None:
        """A link of a group is made. The group becomes usable with the last."""
        group = self._open_group(session.group)
        if group is None or session.cluster_id not in group.missing:
            await session.cut("its rank-table link is not being made any more")
            return
        group.sessions[session.cluster_id] = session
        if len(group.sessions) == len(group.plan.members):
            for member in group.sessions.values():
                self._links.add(member)
                for stale in member.displaced:
                    await stale.cut(f"cluster {member.cluster_id} linked anew")
                member.report()
                self._warn_of_user(member)
            group.settle(RegisterMemStatus.OK)

    def leave(self, session: Session) -> None:
        """A link of a group ended; one that is still being made has failed then."""
        group = self._open_group(session.group)
        if group is not None and group.sessions.get(session.cluster_id) is session:
            self._fail(group, f"cluster {session.cluster_id} was lost while linking")

    async def _prepare(self, group: Group, linker: Linker) -> None:
        try:
            if reason := await prepare(group, linker):
                self._fail(group, reason)
        except Exception as error:  # whatever it is, nobody must wait for this group
            self._fail(group, f"{type(error).__name__}: {error}")
            raise
        if group.status is RegisterMemStatus.FAILED:
            await self._end(group, "its rank-table link failed")

    def _open_group(self, name: str) -> Group | None:
        """The group that is being made and can be the one of that name."""
        with self._lock:
            for group in self._groups.values():
                is_open = group.status is RegisterMemStatus.PREPARING
                if is_open and may_be_one(group.plan.name, name):
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

    def _warn_of_user(self, member: Session) -> None:
        """Nobody proved who this is, and the name at which members meet can be guessed."""
        process = member.process
        if process is not None and process.uid != os.getuid() and not self._is_secure:
            get_logger().warning(
                "cluster %d is linked by a rank table to process %d of user %d, as cluster %d, "
                "without link security; this process is user %d's",
                self._cluster_id, process.pid, process.uid, member.cluster_id, os.getuid(),
            )  # fmt: skip

    def _fail(self, group: Group, reason: str) -> None:
        get_logger().error("cluster %d: rank-table link failed: %s", self._cluster_id, reason)
        group.settle(RegisterMemStatus.FAILED)

    async def _end(self, group: Group, reason: str) -> None:
        if group.status is RegisterMemStatus.PREPARING:
            group.settle(RegisterMemStatus.FAILED)
        task = group.task
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for session in list(group.sessions.values()):
            await session.cut(reason)
