"""Carries out what the plan decides, in the loop's thread."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from llm_datadist.directory.base import Changes
from llm_datadist.errors import LLMStatusCode
from llm_datadist.following.plan import Action, Leave, Link, MakeRoom, Plan
from llm_datadist.links.linker import Target
from llm_datadist.observe.log import get_logger
from llm_datadist.running.bell import Bell

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping, Sequence
    from typing import TypeAlias

    from llm_datadist.directory.record import Record
    from llm_datadist.following.plan import Cut
    from llm_datadist.following.wants import Wants
    from llm_datadist.links.filing import Filing
    from llm_datadist.links.linker import Linker
    from llm_datadist.links.session import Session
    from llm_datadist.links.table import LinkTable
    from llm_datadist.running.loop import Loop

    Facts: TypeAlias = Mapping[str, str]
    #: a cluster id and an incarnation: whose record copies another's incarnation is not that one
    Start: TypeAlias = tuple[int, str]

#: so many members are looked at before the loop has its turn again
_PORTION: Final = 64
_LINK_S: Final = 3.0
#: what a peer has to agree to be unlinked, beside the calls that run
_LEAVE_S: Final = 2.0
_SUPERSEDED: Final = (
    "another start has this cluster's own place in the fleet, so it links to nobody"
)


class Driver:
    """Belongs to the loop's thread, but for `members`, `missing` and the counts."""

    def __init__(
        self,
        loop: Loop,
        linker: Linker,
        filing: Filing,
        links: LinkTable,
        cluster_id: int,
        wants: Wants | None,
        facts: Facts,
        sync_timeout_s: float,
    ) -> None:
        self._loop = loop.asyncio
        self._call_soon = loop.call_soon
        self._linker = linker
        self._filing = filing
        self._links = links
        self._cluster_id = cluster_id
        self._sync_timeout_s = sync_timeout_s
        self.plan = Plan(cluster_id, wants, facts, random.random)
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        #: the members that are being unlinked to make room for others
        self._yielding: set[Start] = set()
        #: what the directory said, and was not looked at yet
        self._news: deque[Changes] = deque()
        self._is_taking = False
        #: why nobody is linked: its program switches roles, another start has its place
        self._is_down = self._is_superseded = False
        #: the members that were linked from here, and by nobody else of this program
        self._made: set[Start] = set()
        self._is_over = False
        #: rung when somebody has come or gone, a link was made or has ended
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
        self._filing.shut_because = ""
        if self._links.watcher is self:
            self._links.watcher = None
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    def told(self, changes: Changes) -> None:
        """What the directory says; of us it says nothing new."""
        self._news.extend(_portions(changes, self._cluster_id))
        if not self._is_taking:
            self._take()

    def _take(self) -> None:
        """A portion at a time: in between the loop has its other work."""
        self._is_taking = bool(self._news) and not self._is_over
        if self._is_taking:
            self._loop.call_soon(self._take)  # first: a program's logging handler may raise
            self._told(self._news.popleft())

    def _told(self, changes: Changes) -> None:
        self.num_joined += len(changes.joined)
        self.num_left += len(changes.left)
        self.num_changed += len(changes.changed)
        self.plan.told(changes, self._loop.time())
        self.bell.ring()
        for record in (*changes.joined, *(change.now for change in changes.changed)):
            if self._sessions(record):  # a link was there before its news
                self.plan.made(record.cluster_id, record.incarnation, self._loop.time())
        self.act()
        self._log(changes)

    async def stand_down(self, timeout_s: float) -> None:
        """Unlinks from everybody; nobody links to us, nor we to anybody, until `stand_up`.

        Who does not agree in time is cut.
        """
        self._is_down = self.plan.is_paused = True
        self._filing.shut_because = "this cluster has left its fleet, to switch its role"
        await asyncio.gather(*(self._end(each, timeout_s) for each in self._links.all()))

    def stand_up(self) -> None:
        """The end of `stand_down`. May be called again."""
        self._is_down = False
        self._filing.shut_because = ""
        self._go_on()

    def superseded(self, is_so: bool) -> None:
        """Whether another start has our place: then nobody is linked from here."""
        self._is_superseded = is_so
        if is_so and not self._is_over:
            for session in self._links.all():
                if self._is_made(session):
                    self._start(self._end(session, self._sync_timeout_s + _LEAVE_S))
        self._go_on()

    def _go_on(self) -> None:
        self.plan.is_paused = self._is_down or self._is_superseded
        self.act()

    async def _end(self, session: Session, timeout_s: float) -> None:
        if not await self._linker.end(session, timeout_s):
            await session.cut("it did not agree to be unlinked in time")

    def link_made(self, session: Session) -> None:
        """As LinkTable tells it."""
        incarnation = session.instance.hex()
        if self._linker.ours([session]):
            self.plan.made(session.cluster_id, incarnation, self._loop.time())
        if not session.is_caller and self.plan.was_replaced(session.cluster_id, incarnation):
            # while it lives nobody else may come with that id
            self._start(session.cut("another start has taken its place in the fleet"))
        self.bell.ring()

    def link_ended(self, session: Session) -> None:
        """As LinkTable tells it."""
        incarnation = session.instance.hex()
        others = self._linker.ours(self._links.of(session.cluster_id))
        if all(other.instance != session.instance for other in others):
            self._made.discard(_linked(session))
            has_yielded = _linked(session) in self._yielding
            self.plan.ended(
                session.cluster_id, incarnation, self._loop.time(), has_yielded=has_yielded
            )
            self.act()
        self.bell.ring()

    def used(self, sessions: Sequence[Session]) -> Session | None:
        """As LinkTable asks, in any thread: that to the start that is announced.

        Where there is none, one that the program has made itself counts, by its own word; and where
        nobody is announced, any but those to a start that was replaced.
        """
        cluster_id = sessions[0].cluster_id
        member = self.plan.members.get(cluster_id)
        if member is not None:
            incarnation = bytes.fromhex(member.record.incarnation)
            for session in sessions:
                if session.instance == incarnation:
                    member.used_at = self._loop.time()
                    return session
        for session in sessions:
            if session.is_caller and not self._is_made(session):
                return session
        for session in sessions if member is None else ():
            if not self.plan.was_replaced(cluster_id, session.instance.hex()):
                return session
        return None

    def missing(self, cluster_id: int) -> str:
        """As LinkTable asks, in any thread: what is known of a cluster that is not linked."""
        member = self.plan.members.get(cluster_id)
        if member is None:
            return "nobody of that id is announced"
        if self._is_superseded:
            return _SUPERSEDED
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
            self._start(self._do(action))
        if self._timer is not None:
            self._timer.cancel()
        at = self.plan.next_at
        self._timer = None if at is None else self._loop.call_at(at, self.act)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _asked(self, cluster_id: int) -> None:
        self.plan.asked(cluster_id, self._loop.time())
        self.act()

    async def _do(self, action: Action) -> None:
        if isinstance(action, Link):
            await self._link(action.record)
        elif isinstance(action, Leave):
            await self._leave(action)
        elif isinstance(action, MakeRoom):
            await self._make_room(action.record)
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
        because = "it has left the fleet" if member is None else member.objection
        if not because and self._is_superseded:
            because = _SUPERSEDED
        if not problem and because:
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
        self._made.add(_announced(record))
        outcome = await self._linker.link(target, _LINK_S, expected=incarnation)
        if outcome.status is LLMStatusCode.LLM_SUCCESS or self._sessions(record):
            return ""
        self._made.discard(_announced(record))
        return outcome.reason

    async def _leave(self, action: Leave) -> None:
        """Who says nothing is cut."""
        record = action.record
        has_left = self.plan.find(record.cluster_id, record.incarnation) is None
        for session in self._all(record) if has_left else self._sessions(record):
            get_logger().info(
                "cluster %d unlinks from %s: %s", self._cluster_id, record, action.because
            )
            await self._end(session, self._sync_timeout_s + _LEAVE_S)

    async def _make_room(self, record: Record) -> None:
        """Nobody who is used is unlinked for that, and one for each."""
        idle = (each for each in self.plan.yielding() if self._may_yield(each))
        other = next(idle, None)
        try:
            if other is not None:
                self._yielding.add(_announced(other))
                await self._leave(Leave(other, f"{record} needs its place"))
        finally:
            if other is not None:
                self._yielding.discard(_announced(other))
            self.plan.made_room(record)
        self.act()

    def _may_yield(self, record: Record) -> bool:
        sessions = self._sessions(record)
        is_used = any(each.num_running for each in sessions)
        return bool(sessions) and not is_used and _announced(record) not in self._yielding

    async def _cut(self, action: Cut) -> None:
        incarnation = bytes.fromhex(action.record.incarnation)
        for session in self._links.of(action.record.cluster_id):
            if session.instance != incarnation:
                await session.cut(f"{action.record} has taken its place in the fleet")

    def _is_made(self, session: Session) -> bool:
        return session.is_caller and _linked(session) in self._made

    def _sessions(self, record: Record) -> list[Session]:
        """The links to that very incarnation, that are ours to use."""
        return self._linker.ours(self._all(record))

    def _all(self, record: Record) -> list[Session]:
        """The links to that very incarnation."""
        incarnation = bytes.fromhex(record.incarnation)
        sessions = self._links.of(record.cluster_id)
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


def _announced(record: Record) -> Start:
    return record.cluster_id, record.incarnation


def _linked(session: Session) -> Start:
    return session.cluster_id, session.instance.hex()


def _portions(changes: Changes, us: int) -> Iterator[Changes]:
    """The changes of others, in their order, so many at a time."""
    for at in range(0, len(changes.left), _PORTION):
        yield Changes(left=_others(changes.left[at : at + _PORTION], us))
    for at in range(0, len(changes.changed), _PORTION):
        portion = changes.changed[at : at + _PORTION]
        yield Changes(changed=tuple(each for each in portion if each.now.cluster_id != us))
    for at in range(0, len(changes.joined), _PORTION):
        yield Changes(joined=_others(changes.joined[at : at + _PORTION], us))


def _others(records: Sequence[Record], us: int) -> tuple[Record, ...]:
    return tuple(record for record in records if record.cluster_id != us)
