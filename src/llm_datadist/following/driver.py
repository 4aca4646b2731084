"""Carries out what the plan decides, in the loop's thread."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import TYPE_CHECKING, Final

from llm_datadist.directory.base import Change, Changes
from llm_datadist.errors import LLMStatusCode
from llm_datadist.following.plan import Action, Cut, Leave, Link, Plan
from llm_datadist.links.linker import Target
from llm_datadist.observe.log import get_logger
from llm_datadist.running.bell import Bell

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeAlias

    from llm_datadist.directory.record import Record
    from llm_datadist.following.wants import Wants
    from llm_datadist.links.linker import Linker
    from llm_datadist.links.session import Session
    from llm_datadist.links.table import LinkTable
    from llm_datadist.running.loop import Loop

    Facts: TypeAlias = Mapping[str, str]

_LINK_S: Final = 3.0
#: what a peer has to agree to be unlinked, beside the calls that run
_LEAVE_S: Final = 2.0


class Driver:
    """Belongs to the loop's thread, but for `members`, `missing` and the counts."""

    def __init__(
        self,
        loop: Loop,
        linker: Linker,
        links: LinkTable,
        cluster_id: int,
        wants: Wants | None,
        facts: Facts,
        sync_timeout_s: float,
    ) -> None:
        self._loop = loop.asyncio
        self._call_soon = loop.call_soon
        self._linker = linker
        self._links = links
        self._cluster_id = cluster_id
        self._sync_timeout_s = sync_timeout_s
        self.plan = Plan(cluster_id, wants, facts, random.random)
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_over = False
        #: rung when a link was made or has ended
        self.bell = Bell()
        self.num_joined = self.num_left = self.num_changed = 0
        self.num_linked = self.num_failed = 0

    def begin(self) -> None:
        """From here on it is told of links."""
        self._links.watcher = self
        for session in self._links.all():
            self.link_made(session)

    def stop(self) -> None:
        """Decides nothing any more; links stay. May be called again."""
        self._is_over = True
        if self._links.watcher is self:
            self._links.watcher = None
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    def told(self, changes: Changes) -> None:
        """What the directory says; of us it says nothing new."""
        others = [[each for each in kind if _id_of(each) != self._cluster_id] for kind in changes]
        changes = Changes(*map(tuple, others))  # type: ignore[arg-type]
        self.num_joined += len(changes.joined)
        self.num_left += len(changes.left)
        self.num_changed += len(changes.changed)
        self._log(changes)
        self.plan.told(changes, self._loop.time())
        for record in (*changes.joined, *(change.now for change in changes.changed)):
            if self._sessions(record):  # a link was there before its news
                self.plan.made(record.cluster_id, record.incarnation, self._loop.time())
        self.act()

    def pause(self) -> None:
        """Links to nobody, until `resume`."""
        self.plan.is_paused = True

    def resume(self) -> None:
        """The end of `pause`."""
        self.plan.is_paused = False
        self.act()

    def link_made(self, session: Session) -> None:
        """As LinkTable tells it."""
        self.plan.made(session.cluster_id, session.instance.hex(), self._loop.time())
        self.bell.ring()

    def link_ended(self, session: Session) -> None:
        """As LinkTable tells it."""
        incarnation = session.instance.hex()
        others = self._links.of(session.cluster_id)
        if all(other.instance != session.instance for other in others):
            self.plan.ended(session.cluster_id, incarnation, self._loop.time())
            self.act()
        self.bell.ring()

    def missing(self, cluster_id: int) -> str:
        """As LinkTable asks, in any thread: what is known of a cluster that is not linked."""
        member = self.plan.members.get(cluster_id)
        if member is None:
            return "nobody of that id is announced"
        self._call_soon(partial(self._asked, cluster_id))
        if member.objection:
            return f"it is announced, and does not fit: {member.objection}"
        problem = f" (last: {member.problem})" if member.problem else ""
        return f"it is announced at {member.record.endpoint}, and is being linked{problem}"

    def act(self) -> None:
        """Begins what is to be done, and looks again when there is more."""
        if self._is_over:
            return
        for action in self.plan.decide(self._loop.time()):
            task = self._loop.create_task(self._do(action))
            self._tasks.add(task)
            task.add_done_callback(self._done)
        if self._timer is not None:
            self._timer.cancel()
        at = self.plan.next_at
        self._timer = None if at is None else self._loop.call_at(at, self.act)

    async def leave_all(self) -> None:
        """Unlinks from everybody, each in order, or not at all."""
        sessions = self._links.all()
        await asyncio.gather(*(self._linker.end(session, self._leave_s) for session in sessions))

    def _asked(self, cluster_id: int) -> None:
        self.plan.asked(cluster_id, self._loop.time())
        self.act()

    async def _do(self, action: Action) -> None:
        if isinstance(action, Link):
            await self._link(action.record)
        elif isinstance(action, Leave):
            await self._leave(action)
        else:
            await self._cut(action)

    async def _link(self, record: Record) -> None:
        problem = "it was interrupted"
        try:
            problem = await self._try(record)
        finally:
            self.plan.tried(record, problem, self._loop.time())
        if problem:
            self.num_failed += 1
            get_logger().info("cluster %d does not reach %s: %s", self._cluster_id, record, problem)
        else:
            self.num_linked += 1
        member = self.plan.find(record.cluster_id, record.incarnation)
        if not problem and (member is None or member.objection):
            because = member.objection if member else "it has left the fleet"
            await self._leave(Leave(record, because))
        self.act()

    async def _try(self, record: Record) -> str:
        """Why there is no link to it; empty when there is."""
        endpoint = record.endpoint
        assert endpoint is not None  # what does not listen is not wanted
        if self._sessions(record):
            return ""
        target = Target(record.cluster_id, (endpoint,))
        incarnation = bytes.fromhex(record.incarnation)
        outcome = await self._linker.link(target, _LINK_S, expected=incarnation)
        if outcome.status is LLMStatusCode.LLM_SUCCESS or self._sessions(record):
            return ""
        return outcome.reason

    async def _leave(self, action: Leave) -> None:
        """Nobody who is used is unlinked to make room; who says nothing is cut."""
        sessions = self._sessions(action.record)
        member = self.plan.find(action.record.cluster_id, action.record.incarnation)
        if member is not None and not member.objection:  # it is to make room
            sessions = [] if any(each.num_running for each in sessions) else sessions
        for session in sessions:
            get_logger().info(
                "cluster %d unlinks from %s: %s", self._cluster_id, action.record, action.because
            )
            if not await self._linker.end(session, self._leave_s):
                await session.cut(action.because)

    async def _cut(self, action: Cut) -> None:
        incarnation = bytes.fromhex(action.record.incarnation)
        for session in self._links.of(action.record.cluster_id):
            if session.instance != incarnation:
                await session.cut(f"{action.record} has taken its place in the fleet")

    @property
    def _leave_s(self) -> float:
        return self._sync_timeout_s + _LEAVE_S

    def _sessions(self, record: Record) -> list[Session]:
        """The links to that very incarnation, that are ours to use."""
        incarnation = bytes.fromhex(record.incarnation)
        sessions = self._linker.ours(self._links.of(record.cluster_id))
        return [session for session in sessions if session.instance == incarnation]

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            get_logger().error("following a fleet made a mistake", exc_info=task.exception())

    def _log(self, changes: Changes) -> None:
        logger = get_logger()
        for record in changes.joined:
            logger.info("%s has joined the fleet, at %s", record, record.endpoint)
        for record in changes.left:
            logger.info("%s has left the fleet", record)
        for change in changes.changed:
            logger.info("%s is %s now, at %s", change.before, change.now, change.now.endpoint)


def _id_of(news: Record | Change) -> int:
    record = news.now if isinstance(news, Change) else news
    return record.cluster_id
