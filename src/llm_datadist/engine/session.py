"""A session: one end of a link at work. It does what the link machine decides, and nothing else.

The control connection, the machine and the services belong to the loop's thread; `gate`,
`streams`, `lookup` and `channel` are used by the threads that transfer.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist.core import link as lk
from llm_datadist.core import messages as m
from llm_datadist.core.remote import Guard
from llm_datadist.core.segments import Segments
from llm_datadist.engine.control import ConnectionEnded, Control, dial
from llm_datadist.engine.gate import Gate
from llm_datadist.engine.lookup import Lookup
from llm_datadist.engine.requests import verify as verify_moved
from llm_datadist.engine.service import MAX_ANSWER_S, StreamService
from llm_datadist.engine.streams import MAX_STREAMS, StreamPool
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.observe.log import get_logger
from llm_datadist.observe.recorder import NEVER
from llm_datadist.observe.watch import Watch
from llm_datadist.transport.base import Channel, PathUnavailable, verify
from llm_datadist.transport.deadline import Deadline
from llm_datadist.transport.sealed import open_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from llm_datadist.core.geometry import U64
    from llm_datadist.core.registry import Entry
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.engine.context import Context
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.transport.stream import Stream

_DIAL_BACK_S = 10.0
#: a peer that drops a stream asks for the next one before we have noticed
_MAX_SERVICES = 2 * MAX_STREAMS


class Session:
    """One link to one peer."""

    def __init__(
        self,
        context: Context,
        control: Control,
        link: lk.CallerLink | lk.ListenerLink,
        endpoint: Endpoint | None,
        group: str = "",
    ) -> None:
        self._context = context
        control.watch()
        self._control = control
        self._link = link
        #: where the caller reached its peer; None at the listener
        self.endpoint = endpoint
        #: the rank-table link that this one belongs to, if any
        self.group = group
        self._host, self._port = control.address[:2]
        #: transfers on this link, in any thread
        self.gate = Gate(context.recorder)
        self.streams = StreamPool(self._open_stream, context.recorder)
        self.lookup = Lookup(self.streams, is_tabled=context.me.is_remote_accessible)
        self._channels: dict[str, Channel] = {}
        self._services: set[StreamService] = set()
        #: streams for the peer: under way, and to be dialled when there is room
        self._dialing = self._owed = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._deadline = Deadline.after(0)
        self.status = LLMStatusCode.LLM_SUCCESS
        self.reason = ""
        self.closed = asyncio.Event()
        #: the hand-shake is over, one way or the other
        self._settled = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None
        self._on_close: list[Callable[[], object]] = []

    # -- what the peer said, once it is linked --

    @property
    def cluster_id(self) -> int:
        return self._peer.cluster_id

    @property
    def instance(self) -> bytes:
        return self._peer.instance

    @property
    def path(self) -> str:
        return self._link.path

    @property
    def path_reason(self) -> str:
        """Why better paths are not used; empty when there is no better one."""
        return "; ".join(f"{path}: {reason}" for path, reason, _ in self._link.rejected)

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
    def token(self) -> bytes:
        return self._link.token

    @property
    def asks_owner(self) -> bool:
        """Whether the owner of what is read takes part in the reading."""
        return self._context.transports[self._link.path].asks_owner

    @property
    def channel(self) -> Channel:
        return self._channels[self._link.path]

    @property
    def _peer(self) -> lk.Peer:
        assert self._link.peer is not None
        return self._link.peer

    def supersedes(self, other: Session) -> bool:
        """Whether this session is what became of the other one's link."""
        if self.group != other.group:
            return False
        same_way = self.is_caller == other.is_caller and self.instance == other.instance
        return same_way or (self.endpoint is not None and self.endpoint == other.endpoint)

    def require_reach(self, entry: Entry) -> None:
        """Raises LLMException unless the link's path moves memory such as this cache's."""
        if entry.space not in self._context.transports[self.path].reaches:
            raise invalid(
                f"our cache {entry.cache_id} lies in {entry.space}, which the path {self.path} of "
                f"the link to cluster {self.cluster_id} does not reach"
            )

    def fetch(self, request: m.Fetch) -> None:
        """Does what the peer's `send` asks. In a thread of the fetchers."""
        timeout_s = min(request.timeout_ms / 1000, MAX_ANSWER_S)
        if self.path == "cma":  # one host, one clock: what was asked long ago is seen to be late
            deadline = Deadline(min(Deadline.after(timeout_s).at, request.deadline_at), timeout_s)
        else:
            deadline = Deadline.after(timeout_s)
        src, dst, nbytes = m.columns_of(request.columns, 3)
        guard = Guard(request.src_cache_id, request.src_generation, request.src_word_addr)
        catalog = self._context.catalog
        with (
            self.gate,
            catalog.writable(request.cache_id, request.generation, dst, nbytes) as target,
        ):
            self.require_reach(target)
            deadline.require("a push by the peer")
            self.read(Segments(src, dst, nbytes), guard, deadline)

    def _fetch_counted(self, recorder: Recorder, request: m.Fetch) -> None:
        with Watch(recorder.series("fetch", self.cluster_id, self.path)) as watch:
            watch.moves(Segments(*m.columns_of(request.columns, 3)))
            self.fetch(request)

    def _count_served(self, recorder: Recorder, nbytes: U64) -> None:
        """What a peer reads from us by asking."""
        series = recorder.series("serve", self.cluster_id, self.path)
        series.add((NEVER, NEVER, NEVER, NEVER, 1, int(nbytes.sum()), len(nbytes)))

    def read(self, segments: Segments, guard: Guard, deadline: Deadline) -> None:
        """Reads over the link's path, and verifies what came where the options say so."""
        self.channel.read(segments, guard, deadline)
        if self._context.verifies and len(segments):
            movers = self._context.movers
            parts = segments.split(movers.parts_of(segments.total_nbytes))
            check = partial(verify_moved, self.streams, src=guard, deadline=deadline)
            movers.run([partial(check, part) for part in parts])

    # -- the link's life, in the loop's thread --

    async def greet(self, actions: Sequence[lk.Action], timeout_s: float) -> None:
        """The hand-shake from its first actions on; afterwards the link is made or closed."""
        self._deadline = Deadline.after(timeout_s)
        try:
            await asyncio.wait_for(self._shake_hands(actions), timeout_s)
        except asyncio.TimeoutError:
            await self.perform(
                self._link.timed_out(f"the hand-shake was not done within {timeout_s:.3f} s")
            )
        except asyncio.CancelledError:
            await self.cut("this cluster was finalized")
            raise
        finally:
            if self._listening is None:
                self._control.close()
            elif self.is_closed:
                await asyncio.wait([self._listening])
                self._control.close()  # a task that is cancelled before it began closes nothing

    async def join(self) -> None:
        """Waits for what a closed session still has running."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def leave(self, timeout_s: float) -> bool:
        """Unlinks with the peer's consent; False when it does not answer, the link is then kept."""
        await self.perform(self._link.leave())
        try:
            await asyncio.wait_for(self.closed.wait(), timeout_s)
        except asyncio.TimeoutError:
            self._link.stay()
            self.gate.open()
            return False
        return True

    async def cut(self, reason: str) -> None:
        await self.perform(self._link.cut(reason))

    async def perform(self, actions: Sequence[lk.Action]) -> None:
        """Does what the machine decided, and what it decides on the results."""
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, lk.Send):
                todo.extend(await self._send(action.message))
            elif isinstance(action, lk.Probe):
                self._spawn(self._probe(action.path))
            elif isinstance(action, lk.Publish):
                await self._publish()
            elif isinstance(action, lk.Dial):
                self._dial_back(action.count)
            elif isinstance(action, lk.Drain):
                self._spawn(self._drain_for_peer())
            elif isinstance(action, lk.Retract):
                self._context.links.remove(self, "the peer unlinked")
            else:
                self._close(action)

    def when_closed(self, call: Callable[[], object]) -> None:
        self._on_close.append(call)

    def serve(self, control: Control) -> None:
        """Answers the peer's requests on a connection of its."""
        context = self._context
        fetch, count = self.fetch, None
        if context.recorder is not None:
            fetch = partial(self._fetch_counted, context.recorder)
            count = partial(self._count_served, context.recorder)
        service = StreamService(control, context, fetch, self._end_service, count)
        self._services.add(service)
        service.start()

    def _end_service(self, service: StreamService) -> None:
        self._services.discard(service)
        self._dial_back(0)

    async def _shake_hands(self, actions: Sequence[lk.Action]) -> None:
        await self.perform(actions)
        if not self.is_closed:
            self._listening = self._spawn(self._listen())
            await self._settled.wait()

    async def _listen(self) -> None:
        try:
            while not self.is_closed:
                await self._receive()
        finally:
            self._control.close()

    async def _receive(self) -> None:
        try:
            message = await self._control.receive()
        except ConnectionEnded as error:
            await self.perform(self._link.lost(str(error)))
        else:
            await self.perform(self._link.received(message))

    async def _send(self, message: m.Message) -> Sequence[lk.Action]:
        try:
            await self._control.send(message)
        except ConnectionEnded as error:
            return self._link.lost(str(error))
        return ()

    async def _probe(self, path: str) -> None:
        await self.perform(await self._verify(path))

    async def _verify(self, path: str) -> Sequence[lk.Action]:
        context = self._context
        try:
            if context.transports[path].may_wait:
                opening = context.loop.run_in_executor(context.waiters, self._open_and_verify, path)
                channel = await opening
            else:
                channel = self._open_and_verify(path)
        except PathUnavailable as error:
            if self._deadline.remaining_s() <= 0:
                return self._link.timed_out(f"{path} could not be verified: {error.reason}")
            return self._link.probed(path, error.reason, is_remarkable=error.is_remarkable)
        self._channels[path] = channel
        if self.is_closed:  # it ended meanwhile
            self._close_channels()
        return self._link.probed(path, None, is_remarkable=False)

    def _open_and_verify(self, path: str) -> Channel:
        """In a thread of the waiters, unless it cannot wait. Raises PathUnavailable."""
        peer = self._peer
        transport = self._context.transports[path]
        try:
            channel = transport.open(peer.offers[path], self.streams)
        except LLMException as error:
            raise PathUnavailable(str(error)) from error
        try:
            verify(transport, channel, peer.probe, self._deadline)
        except BaseException:
            channel.close()
            raise
        return channel

    def _close_channels(self, keep: str = "") -> None:
        """Closes the channels, but that of one path. They stay known: a transfer may have one."""
        for path, channel in list(self._channels.items()):
            try:
                if path != keep:
                    channel.close()
            except Exception:  # a transport's mistake must not keep the link from ending
                get_logger().exception("closing the path %s failed", path)

    async def _publish(self) -> None:
        self._control.trust()
        self._close_channels(keep=self.path)
        self.gate.open()
        if self.group:
            await self._context.groups.join(self)
        else:
            await self._file()
        self._settled.set()

    async def _file(self) -> None:
        links = self._context.links
        is_echo = self.instance == self._context.me.instance and not self.is_caller
        if not is_echo:  # the answering end of a link to ourselves is not one to use
            for stale in links.add(self):
                await stale.cut(f"cluster {self.cluster_id} linked anew")
        self.report()

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
        await self._context.loop.run_in_executor(
            self._context.waiters, self.gate.drain, self._context.sync_timeout_s
        )
        await self.perform(self._link.drained())

    def _dial_back(self, count: int) -> None:
        """Opens streams for the peer: at once, or when it has no more than an honest one uses."""
        self._owed = min(self._owed + count, MAX_STREAMS)
        while self._owed and len(self._services) + self._dialing < _MAX_SERVICES:
            self._owed -= 1
            self._dialing += 1
            self._spawn(self._dial())

    async def _dial(self) -> None:
        try:
            await asyncio.wait_for(self._add_service(), _DIAL_BACK_S)
        except (OSError, asyncio.TimeoutError, ConnectionEnded) as error:
            get_logger().warning(
                "could not open a stream for cluster %d: %s", self.cluster_id, error
            )
        finally:
            self._dialing -= 1
            self._dial_back(0)

    async def _add_service(self) -> None:
        shield = self._context.shields.make(is_caller=True)
        control = await dial(self._host, self._port, self._context.waiters, shield)
        try:
            await control.send(m.Attach(self.token, is_reverse=True))
            answer = await control.receive()
        except BaseException:
            control.close()
            raise
        if isinstance(answer, m.Attached) and not self.is_closed:
            self.serve(control)
        else:
            control.close()

    def _open_stream(self, deadline: Deadline) -> Stream | None:
        """In any thread: a caller dials, a listener asks its caller to."""
        if not self.is_caller:
            loop = self._context.loop
            loop.call_soon_threadsafe(lambda: self._spawn(self.perform([lk.Send(m.DialBack(1))])))
            return None
        try:
            sock = socket.create_connection(
                (self._host, self._port), deadline.require("opening a stream to the peer")
            )
        except TimeoutError:
            raise deadline.expired("opening a stream to the peer") from None
        except OSError as error:
            raise LLMException(
                f"no stream to {self.endpoint} could be opened: {error}",
                LLMStatusCode.LLM_NOT_YET_LINK,
            ) from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = open_stream(sock, self._context.shields.make(is_caller=True))
        try:
            stream.greet(deadline)
            stream.ask(m.Attach(self.token, is_reverse=False), deadline)
        except BaseException:
            stream.close()
            raise
        return stream

    def _close(self, action: lk.Close) -> None:
        self.status, self.reason = action.status, action.reason
        ending = f"the link ended because {action.reason}"
        self.gate.shut(ending)
        if self._link.peer is not None:
            self._context.links.remove(self, action.reason)
            self._context.groups.leave(self)
            get_logger().info(
                "the link of cluster %d to cluster %d ended: %s",
                self._context.me.cluster_id, self.cluster_id, action.reason,
            )  # fmt: skip
        self.streams.close(ending)
        self._owed = 0
        self._close_channels()
        for service in list(self._services):
            service.close()
        self._control.end()
        self.closed.set()
        self._settled.set()
        for call in self._on_close:
            call()

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = self._context.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
