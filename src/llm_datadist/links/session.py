"""A session: one end of a link, from its first message to its end, in the loop's thread.

It does what the link machine (`core/link.py`) decides, and nothing else: sends, verifies paths,
publishes, closes. What comes of each is told to the machine, which may decide more. So a session
has no state of its own beside its resources, and the machine none beside its rules.

Guaranteed: a link is published, as a `Peer`, only when both ends have moved bytes over its path;
with the end of a session its door is shut, its streams, channels and services are closed, and
whoever is told of links (`Registrar`) was told. After `cut` nothing of a session begins any more;
`join` waits for what it has running.

Only the loop's thread calls a session, but for `_ask_for_stream`, which threads call that lack a
stream. No locks. A session knows neither the table of links nor
groups: it tells a Registrar. Rejected: a thread for each link (a thousand peers), and a Peer that
exists during the hand-shake (threads would have to ask whether it is one yet).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Protocol

from llm_datadist.core import link as lk
from llm_datadist.core import link_actions as act
from llm_datadist.core import messages as m
from llm_datadist.errors import LLMStatusCode
from llm_datadist.links.control import ConnectionEnded, Control, Unwelcome
from llm_datadist.links.joining import Joining
from llm_datadist.links.paths import Paths
from llm_datadist.links.services import MAX_EARLY, Services
from llm_datadist.links.vouching import Answer, Vouching
from llm_datadist.observe.log import get_logger
from llm_datadist.owner.guest import Guest
from llm_datadist.peer.peer import Peer
from llm_datadist.peer.streams import MAX_STREAMS, StreamPool
from llm_datadist.running.deadline import Deadline
from llm_datadist.running.gate import Door
from llm_datadist.transport.base import PathUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from llm_datadist.endpoint import Endpoint
    from llm_datadist.links.context import Context
    from llm_datadist.transport.certificate import Certificate
    from llm_datadist.transport.same_host import Process
    from llm_datadist.transport.stream import Stream


class Registrar(Protocol):
    """Who is told how links fare. Called in the loop's thread."""

    async def linked(self, session: Session) -> None:
        """The link is made; whoever files it may use it from here on, or cut it."""
        ...

    def retracted(self, session: Session, reason: str) -> None:
        """The link may not be used any more. May be told again."""
        ...

    def ended(self, session: Session, reason: str) -> None:
        """The link is gone."""
        ...


class Session:
    """One link to one peer."""

    def __init__(
        self,
        context: Context,
        registrar: Registrar,
        control: Control,
        link: lk.CallerLink | lk.ListenerLink,
        endpoint: Endpoint | None,
        group: str = "",
        named: int | None = None,
        bundle: bytes = b"",
    ) -> None:
        self._context = context
        self._registrar = registrar
        control.watch()
        #: the connection that it is on
        self.control = control
        self._link = link
        #: where the caller reached its peer; None at the listener, and at a meeting point
        self.endpoint = endpoint
        #: the address behind that name
        self.reached: tuple[str, int] | None = None
        #: the rank-table link that this one belongs to, if any
        self.group = group
        #: names the links of several devices that were made together, and end together
        self.bundle = bundle
        #: how the caller links over the peer's same-host socket; raises PathUnavailable
        self.meeting: Callable[[bytes, Deadline], Awaitable[Session]] | None = None
        self._meeting_task: asyncio.Task[None] | None = None
        #: the id by which the program called the peer
        self.named = named
        #: links of others that end when this one is made
        self.displaced: Sequence[Session] = ()
        self._vouching = Vouching(
            lambda which: self.perform([act.Send(m.Vouch(which))]), self._is_known_gone
        )
        #: what this end answers to when it is asked whether the connection is its own
        self._names: set[bytes] = set()
        #: calls that use this link go through it
        self.door = Door("the link is still being made")
        #: for connections that say that they are the peer's
        self.joining = Joining(context, control, link)
        self._streams = StreamPool(
            self.joining.dial_stream if isinstance(link, lk.CallerLink) else None,
            self._ask_for_stream,
            context.recorder,
            control.process,
        )
        self._paths = Paths(context, self._streams)
        #: the other end, for the threads that move bytes; None while the link is being made
        self.peer: Peer | None = None
        #: the same to those who answer what it asks
        self._guest = Guest(was_called=isinstance(link, lk.CallerLink))
        self.services = Services(context, self._guest, self._dial_service, self._spawn)
        #: the peer's Bye waits for our calls to end
        self._draining: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._deadline = Deadline.after(0)
        self.status = LLMStatusCode.LLM_SUCCESS
        self.reason = ""
        #: whether both ends had drained it when it ended
        self.was_agreed = False
        self.closed = asyncio.Event()
        #: the hand-shake is over, one way or the other
        self._settled = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None
        self._on_close: list[Callable[[], object]] = []

    # -- what the peer said, once it is linked --

    @property
    def cluster_id(self) -> int:
        return self._said.cluster_id

    @property
    def instance(self) -> bytes:
        return self._said.instance

    @property
    def path(self) -> str:
        return self._link.path

    @property
    def rejected(self) -> Sequence[tuple[str, str, bool]]:
        """Better paths that are not used: (path, reason, whether it deserves a warning)."""
        return self._link.rejected

    @property
    def path_reason(self) -> str:
        """Why better paths are not used; empty when there is no better one."""
        return "; ".join(f"{path}: {reason}" for path, reason, _ in self.rejected)

    @property
    def greeting_s(self) -> float:
        """How long its hand-shake may still take, by the caller's time-out."""
        return max(0.0, self._deadline.remaining_s())

    @property
    def state(self) -> str:
        """Of the link's machine: "linked" or "leaving" for a link that is filed."""
        return self._link.state.value

    @property
    def is_closed(self) -> bool:
        return self._link.state is lk.State.CLOSED

    @property
    def is_caller(self) -> bool:
        return isinstance(self._link, lk.CallerLink)

    @property
    def certificate(self) -> Certificate | None:
        """The peer's, under TLS."""
        return self.control.shield.peer_certificate

    @property
    def whereabouts(self) -> str:
        """Where the peer is, for messages."""
        return f"at {self.endpoint or self.control.at}"

    @property
    def process(self) -> Process | None:
        """The peer's, where the kernel says which one that is."""
        return self.control.process

    def _is_known_gone(self) -> bool:
        """Whether a kernel says that the peer does not run, or is not reached."""
        if self.process is not None:
            return self.process.is_stopped
        return self.control.is_unheard

    @property
    def token(self) -> bytes:
        return self._link.token

    @property
    def num_running(self) -> int:
        """Calls that use this link."""
        return self._context.gate.count(self.door)

    @property
    def _said(self) -> lk.Peer:
        assert self._link.peer is not None
        return self._link.peer

    async def drain(self, timeout_s: float) -> bool:
        """Lets no new call use the link, and waits for those that do; False when some still do."""
        context = self._context
        context.gate.shut(self.door, "the link is being unlinked")
        if not self.num_running:  # as ever: no thread need wait for it
            return True
        return await context.loop.run_in_executor(
            context.waiters, context.gate.drain, self.door, timeout_s
        )

    def reopen(self) -> None:
        """The end of `drain`."""
        self._context.gate.open(self.door)

    # -- the link's life, in the loop's thread --

    async def greet(self, actions: Sequence[act.Action], timeout_s: float) -> None:
        """The hand-shake from its first actions on; afterwards the link is made or closed."""
        self._deadline = Deadline.after(timeout_s)
        try:
            await asyncio.wait_for(self._shake_hands(actions), timeout_s)
        except asyncio.TimeoutError:
            silence = "" if self._link.peer else ": nobody there speaks as a cluster does"
            late = f"the hand-shake was not done within {timeout_s:.3f} s{silence}"
            await self.perform(self._link.timed_out(late))
        except asyncio.CancelledError:
            await self.cut("this cluster was finalized")
            raise
        finally:
            if self._listening is None:
                self.control.close()
            elif self.is_closed:
                await asyncio.wait([self._listening])
                self.control.close()  # a task that is cancelled before it began closes nothing

    @property
    def has_answered(self) -> bool:
        """Whether who was called is at the other end, at the caller."""
        return isinstance(self._link, lk.CallerLink) and self._link.has_answered

    def give_up_unless_answered(self) -> None:
        """Ends the hand-shake with whoever is there, if it is not the one that was called."""
        assert isinstance(self._link, lk.CallerLink)
        late = f"{self.control.at} did not answer in the peer's name"
        self._spawn(self.perform(self._link.unanswered(late)))

    async def join(self) -> None:
        """Waits for what a closed session still has running."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def leave(self, timeout_s: float) -> bool:
        """Unlinks with the peer's consent; False when it does not answer: then `stay`."""
        await self.perform(self._link.leave())
        try:
            await asyncio.wait_for(self.closed.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def stay(self) -> None:
        """The end of `drain` and `leave`, where the link is kept."""
        self._link.stay()
        self.reopen()

    async def refuse(self, status: LLMStatusCode, reason: str) -> None:
        await self.perform(self._link.refuse(status, reason))

    async def vouches_for(self, control: Control) -> Answer:
        """Whether the peer says that it is the other end of that connection, too."""
        return Answer.GONE if self.is_closed else await self._vouching.vouches_for(control.name)

    @property
    def silence_s(self) -> float:
        """How long the peer has not answered what it is asked so."""
        return self._vouching.silence_s

    @property
    def is_with_ourselves(self) -> bool:
        """Whether it is this very cluster that called, too."""
        return self.control.name in self._context.called

    async def cut(self, reason: str) -> None:
        await self.perform(self._link.cut(reason))

    async def perform(self, actions: Sequence[act.Action]) -> None:
        """Does what the machine decided, and what it decides on the results."""
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, act.Send):
                todo.extend(await self._send(action.message))
            elif isinstance(action, act.Probe):
                self._spawn(self._probe(action.path))
            elif isinstance(action, act.Meet):
                self._meeting_task = self._spawn(self._meet(action.offer))
            elif isinstance(action, act.Publish):
                # apart: others are asked about it meanwhile, and the peer may ask on this very link
                self._spawn(self._publish(tuple(todo)))
                return
            elif isinstance(action, act.Dial):
                self.services.owe(action.count)
            elif isinstance(action, act.SayWhether):
                context, name = self._context, action.connection
                is_ours = name in context.called or name in context.answered
                todo.extend(await self._send(m.Vouched(action.connection, is_ours)))
            elif isinstance(action, act.Learn):
                self._vouching.learn(action.connection, action.is_theirs)
            elif isinstance(action, act.Drain):
                if self._draining is None or self._draining.done():  # more Byes say no more
                    self._draining = self._spawn(self._drain_for_peer())
            elif isinstance(action, act.Retract):
                self._registrar.retracted(self, "the peer unlinked")
            else:
                self._close(action)

    def when_closed(self, call: Callable[[], object]) -> None:
        self._on_close.append(call)

    async def _shake_hands(self, actions: Sequence[act.Action]) -> None:
        await self.perform(actions)
        if not self.is_closed:
            self._listening = self._spawn(self._listen())
            await self._settled.wait()

    async def _listen(self) -> None:
        try:
            while not self.is_closed and await self._has_received():
                pass
        finally:
            self.control.close()

    async def _has_received(self) -> bool:
        """Whether the connection goes on."""
        try:
            message = await self.control.receive()
        except ConnectionEnded as error:
            if self.peer is not None and isinstance(error, Unwelcome):
                get_logger().warning("the link to cluster %d is cut: %s", self.cluster_id, error)
            await self.perform(self._link.lost(str(error)))
            return False
        if self.is_caller and isinstance(message, m.Welcome):
            self._name_by(message)
        await self.perform(self._link.received(message))
        await asyncio.sleep(0)  # what has come already would be received without a wait
        return True

    def _name_by(self, message: m.Message) -> None:
        """What is said in the hand-shake names the connection: each end then answers to that."""
        if isinstance(message, m.Hello):
            self.control.begun(message)
        elif isinstance(message, m.Welcome):
            self.control.answered(message.instance, message.token)
        else:
            return
        self._names.add(self.control.name)
        self._ours.add(self.control.name)

    @property
    def _ours(self) -> set[bytes]:
        return self._context.called if self.is_caller else self._context.answered

    async def _send(self, message: m.Message) -> Sequence[act.Action]:
        self._name_by(message)
        try:
            await self.control.send(message)
        except ConnectionEnded as error:
            return self._link.lost(str(error))
        return ()

    async def _meet(self, offer: bytes) -> None:
        link = self._link
        assert isinstance(link, lk.CallerLink)
        assert self.meeting is not None
        try:
            met = await self.meeting(offer, self._deadline)
        except PathUnavailable as error:
            await self.perform(link.met(error.reason, is_remarkable=error.is_remarkable))
            return
        if met.is_closed:
            await self.perform(link.ended_elsewhere(met.status, met.reason))
            return
        if self.is_closed:
            await met.cut("the call that it was made for has ended")
        await self.perform(link.met(None))

    async def _probe(self, path: str) -> None:
        await self.perform(await self._verify(path))

    async def _verify(self, path: str) -> Sequence[act.Action]:
        try:
            await self._paths.verify(path, self._said, self._deadline)
        except PathUnavailable as error:
            if self._deadline.remaining_s() <= 0:
                return self._link.timed_out(f"{path} could not be verified: {error.reason}")
            return self._link.probed(path, error.reason, is_remarkable=error.is_remarkable)
        return self._link.probed(path, None, is_remarkable=False)

    def is_full(self, *, is_reverse: bool) -> bool:
        """Whether no more streams may join the link: for our questions (reverse), or the peer's."""
        most = MAX_EARLY if self.peer is None else MAX_STREAMS
        return self._streams.is_full(most) if is_reverse else self.services.is_full

    def add_stream(self, stream: Stream) -> None:
        """A stream that the peer dialled for us."""
        self._streams.add(stream)

    async def _publish(self, rest: Sequence[act.Action]) -> None:
        """The link is made; then the rest of what was decided."""
        context = self._context
        self.peer = Peer(
            self.cluster_id,
            context.transports[self.path],
            self._paths.keep(self.path),
            self._streams,
            self.door,
            self.bundle,
            is_one_sided=context.me.is_remote_accessible,
            checking=context.checking,
        )
        self.reopen()
        self._guest.link_made(self.peer)
        await self._registrar.linked(self)
        await self.perform(rest)
        self._settled.set()

    def report(self) -> None:
        """That the link is made, and why not by a better path."""
        logger = get_logger()
        logger.info(
            "cluster %d is linked to cluster %d by %s", self._context.me.cluster_id,
            self.cluster_id, self.path,
        )  # fmt: skip
        for path, reason, is_remarkable in self._link.rejected:
            if is_remarkable:
                logger.warning(
                    "the link to cluster %d uses %s, because %s is not available: %s",
                    self.cluster_id, self.path, path, reason,
                )  # fmt: skip

    async def _drain_for_peer(self) -> None:
        await self.drain(self._context.sync_timeout_s)
        await self.perform(self._link.drained())

    async def _dial_service(self) -> Control | None:
        """A connection on which the peer asks; None when the link is no more."""
        control = await self.joining.dial_service()
        if control is not None and self.is_closed:
            control.close()
            return None
        return control

    def _ask_for_stream(self) -> None:
        """In any thread."""
        loop = self._context.loop
        loop.call_soon_threadsafe(lambda: self._spawn(self.perform([act.Send(m.DialBack(1))])))

    def _close(self, action: act.Close) -> None:
        self.status, self.reason, self.was_agreed = action.status, action.reason, action.is_agreed
        ending = f"the link ended because {action.reason}"
        self._context.gate.shut(self.door, ending)
        if self.peer is not None:
            self._registrar.ended(self, action.reason)
        meeting = self._meeting_task
        if meeting is not None and meeting is not asyncio.current_task():
            meeting.cancel()
        self._streams.close(ending)
        self._paths.close()
        self.services.close()
        self.control.end()
        self._vouching.close()
        self._ours.difference_update(self._names)
        self.closed.set()
        self._settled.set()
        for call in self._on_close:
            call()

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = self._context.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended_task)
        return task

    def _ended_task(self, task: asyncio.Task[None]) -> None:
        """A mistake of ours ends the link: the peer must not wait for what will not come."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            get_logger().error("a link ends by a mistake", exc_info=error)
            self._spawn(self.cut(f"of a mistake: {error!r:.200}"))
