"""The listener: each connection to the one port, until it is known what it is for."""

from __future__ import annotations

import asyncio
import errno
import math
import secrets
import socket
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.core.link import ListenerLink
from llm_datadist.endpoint import LACKS_ZONE, Endpoint
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.links.control import ConnectionEnded, Control, Unwelcome
from llm_datadist.links.session import Session
from llm_datadist.links.strangers import HAND_SHAKE_S, WHY
from llm_datadist.observe.log import get_logger
from llm_datadist.running import forks
from llm_datadist.running.loop import cancel_all
from llm_datadist.transport.same_host import SameHost
from llm_datadist.transport.sealed import open_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_datadist.core.link_actions import Action
    from llm_datadist.core.stats import ClusterStats
    from llm_datadist.links.context import Context
    from llm_datadist.links.groups import Groups
    from llm_datadist.links.ids import Ids
    from llm_datadist.links.session import Registrar
    from llm_datadist.links.strangers import Strangers
    from llm_datadist.links.table import LinkTable

_BACKLOG = 512
#: strangers may stay silent this long
_GREETING_S = 10.0
#: how long to leave new connections in the backlog when nothing more can be accepted
_EXHAUSTED_S = 0.2
#: … and when descriptors have run out, and strangers make room
_MAKING_ROOM_S = 0.01
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_COMPLAIN_S = 60.0
#: what became of who said Hello, by the status with which its session ended; others are refusals
_TURNED = {LLMStatusCode.LLM_TIMEOUT: WHY.late, LLMStatusCode.LLM_FAILED: WHY.broken}
#: so many addresses are remembered that were refused
_MAX_REFUSED = 1024


def bind(endpoint: Endpoint, *, is_v6_only: bool = False) -> socket.socket:
    """A listening socket; with `is_v6_only` it leaves the port of IPv4 to others.

    Raises LLMException: LLM_FAILED when the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    sock = None
    try:
        sock = forks.open_socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_v6_only:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(endpoint.sockaddr)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except (OSError, OverflowError) as error:
        if sock is not None:
            sock.close()
        code = error.errno if isinstance(error, OSError) else None
        remedy = {
            errno.EADDRINUSE: "another process has it; choose another port, or 0 for a free one",
            errno.EADDRNOTAVAIL: "no interface of this machine has that address",
            errno.EACCES: "ports below 1024 need privileges",
        }.get(code or 0, LACKS_ZONE if endpoint.lacks_zone else str(error))
        raise LLMException(
            f"cannot listen on {endpoint} (listen_ip_info): {remedy}", LLMStatusCode.LLM_FAILED
        ) from error
    return sock


class Listener:
    """Accepts connections. Lives in the loop's thread."""

    def __init__(
        self,
        sock: socket.socket,
        context: Context,
        links: LinkTable,
        groups: Groups,
        ids: Ids,
        registrar: Registrar,
        strangers: Strangers,
        take_snapshot: Callable[[], ClusterStats],
    ) -> None:
        """`take_snapshot` is what whoever asks is told, made in a thread of the waiters."""
        self._socket = sock
        self._context = context
        self._links = links
        self._groups = groups
        self._ids = ids
        self._registrar = registrar
        self._strangers = strangers
        self._take_snapshot = take_snapshot
        self._greetings: dict[asyncio.Task[bool], Control] = {}
        self._sessions: dict[bytes, Session] = {}
        #: addresses that were refused for want of a credential, each with why
        self._refused: set[tuple[str, str]] = set()
        #: when the log said last that nothing can be accepted
        self._complained_at = -math.inf
        context.loop.add_reader(sock, self._accept)

    async def close(self) -> None:
        self._context.loop.remove_reader(self._socket)
        self._socket.close()
        await cancel_all(self._greetings)
        for session in list(self._sessions.values()):
            await session.cut("this cluster was finalized")
            await session.join()

    def _accept(self) -> None:
        loop = self._context.loop
        try:
            sock, address = forks.accept(self._socket)
        except BlockingIOError:
            return
        except OSError as error:
            self._cannot_accept(error)
            return
        is_same_host = sock.family == socket.AF_UNIX
        at = SameHost.of_caller(sock) if is_same_host else Endpoint.of(address)
        try:
            shield = self._context.shields.make(is_caller=False)
            control = Control(sock, at, shield, is_caller=False)
        except OSError:  # it has ended again
            sock.close()
            return
        task = loop.create_task(self._greet(control))
        self._greetings[task] = control
        self._strangers.came(control)
        task.add_done_callback(self._greeted)

    def _cannot_accept(self, error: OSError) -> None:
        """Says so once a minute, and makes room where that helps; others wait in the backlog."""
        loop = self._context.loop
        if loop.time() > self._complained_at + _COMPLAIN_S:
            self._complained_at = loop.time()
            get_logger().error("cannot accept a connection: %s", error)
        loop.remove_reader(self._socket)
        is_short = error.errno in _EXHAUSTED and self._strangers.make_room()
        loop.call_later(_MAKING_ROOM_S if is_short else _EXHAUSTED_S, self._go_on)

    def _go_on(self) -> None:
        if self._socket.fileno() >= 0:
            self._context.loop.add_reader(self._socket, self._accept)

    def _greeted(self, task: asyncio.Task[bool]) -> None:
        """Closes a connection that is not kept; one whose greeting never began is none."""
        control = self._greetings.pop(task)
        self._strangers.known(control)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            get_logger().error("greeting a connection failed", exc_info=error)
        if task.cancelled() or error is not None or not task.result():
            control.close()

    async def _greet(self, control: Control) -> bool:
        """Whether the connection is kept."""
        try:
            first = await asyncio.wait_for(self._first_message(control), _GREETING_S)
            return await self._welcome(control, first)
        except Unwelcome as error:
            self._turn_away(control, error)
        except asyncio.TimeoutError:
            self._strangers.turned_away(WHY.silent)
        except ConnectionEnded as error:
            if self._strangers.known(control):  # else it was counted when it was turned away
                get_logger().debug("a connection said nothing of use: %s", error)
                self._strangers.turned_away(WHY.useless)
        return False

    async def _first_message(self, control: Control) -> m.AnyMessage:
        if not control.shield.is_done:
            await control.greet()
        return await control.receive()

    def _turn_away(self, control: Control, error: Unwelcome) -> None:
        """Says so once for each address and reason: strangers may come often."""
        if not self._strangers.known(control):
            return
        self._strangers.turned_away(WHY.unwelcome)
        host = control.at.host if isinstance(control.at, Endpoint) else str(control.at)
        why = host, str(error)
        if why not in self._refused and len(self._refused) < _MAX_REFUSED:
            self._refused.add(why)
            get_logger().warning("refused a connection from %s: %s", host, error)

    async def _welcome(self, control: Control, first: m.AnyMessage) -> bool:
        """Whether the connection is kept."""
        if isinstance(first, m.Hello):
            return await self._shake_hands(control, first)
        if isinstance(first, m.Attach):
            return await self._attach(control, first)
        if isinstance(first, m.Forget):
            control.begun(first)
            for session in await self._ids.forgotten_by(control, first.instance):
                await session.cut("the peer unlinked")
            await control.send(m.ByeDone())
            return False
        if isinstance(first, m.AskStats):
            self._strangers.asks(control)
            await asyncio.wait_for(self._tell_stats(control), _GREETING_S)
            return False
        self._strangers.turned_away(WHY.useless)
        await control.send(
            m.Refused(
                LLMStatusCode.LLM_FAILED, f"a connection cannot begin with {type(first).__name__}"
            )
        )
        return False

    async def _tell_stats(self, control: Control) -> None:
        """Made in a thread: with hundreds of peers it takes milliseconds."""
        context = self._context
        stats = await context.loop.run_in_executor(context.waiters, self._take_snapshot)
        await control.send(m.Stats(stats.told(to_stranger=not context.shields.is_secure)))
        await control.taken()

    async def _shake_hands(self, control: Control, hello: m.Hello) -> bool:
        self._strangers.said_hello(control)
        session = await self._open_session(control, hello)
        why = _TURNED.get(session.status)
        if session.is_closed and why is not None and self._strangers.known(control):
            self._strangers.turned_away(why)
        return not session.is_closed

    async def _open_session(self, control: Control, hello: m.Hello) -> Session:
        control.begun(hello)
        link = ListenerLink(self._context.me, control.is_same_host, token=secrets.token_bytes(16))
        session = Session(
            self._context, self._registrar, control, link, None, hello.group, bundle=hello.bundle
        )
        self._sessions[session.token] = session
        session.when_closed(lambda: self._sessions.pop(session.token, None))
        timeout_s = min(hello.timeout_ms / 1000, HAND_SHAKE_S)
        first = await self._admit(session, link, hello)
        await session.greet(first, timeout_s)
        return session

    async def _admit(
        self, session: Session, link: ListenerLink, hello: m.Hello
    ) -> Sequence[Action]:
        """What is answered to a Hello."""
        if refusal := self._refusal_of_group(session, hello):  # before others are asked
            return link.refuse(*refusal)
        known = any(not s.is_closed for s in self._links.with_instance(hello.instance))
        is_known = known and not hello.group
        if link.objection_to(hello) is None and (hello.is_fresh or not is_known):
            verdict = await self._ids.of_caller(session, hello.cluster_id)
            if verdict.objection:
                self._strangers.known(session.control)
                self._strangers.turned_away(WHY.another, verdict.objection)
                return link.refuse(LLMStatusCode.LLM_LINK_FAILED, verdict.objection)
        if refusal := self._refusal_of_group(session, hello):  # it may have changed meanwhile
            return link.refuse(*refusal)
        self._groups.answer(session, hello.cluster_id)
        return link.admit(hello, is_known=is_known)

    def _refusal_of_group(
        self, session: Session, hello: m.Hello
    ) -> tuple[LLMStatusCode, str] | None:
        return self._groups.refusal_of(hello, session.process) if hello.group else None

    async def _attach(self, control: Control, attach: m.Attach) -> bool:
        session = self._sessions.get(attach.token)
        is_right = session is not None and session.joining.is_peers(control, attach.proof)
        if session is None or not is_right or not control.frames.is_empty:
            self._strangers.turned_away(WHY.useless)
            text = f"cluster {self._context.me.cluster_id} has no such link"
            await control.send(m.Refused(LLMStatusCode.LLM_NOT_YET_LINK, text))
            return False
        if session.is_full(is_reverse=attach.is_reverse):
            text = "the link has as many streams as it may have"
            await control.send(m.Refused(LLMStatusCode.LLM_FAILED, text))
            return False
        self._strangers.known(control)
        await control.send(m.Attached())
        await control.flushed()
        if attach.is_reverse:
            session.add_stream(open_stream(control.socket, control.shield))
        else:
            session.services.start(control)
        return True
