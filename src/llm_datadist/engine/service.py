"""Serving: the answering end of a request stream, driven by the engine's loop.

Small answers are sent at once in the loop's thread. What does not fit the socket's buffer goes to a
worker thread, and the stream is not listened to meanwhile. A peer that takes nothing for a while
gives the thread back to others.
"""

from __future__ import annotations

import errno
import socket
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.engine.catalog import PROBE_ID
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.observe.log import get_logger
from llm_datadist.transport.checksum import digest_of
from llm_datadist.transport.deadline import Deadline
from llm_datadist.transport.sealed import sealed
from llm_datadist.transport.shield import NotAuthentic
from llm_datadist.transport.tcp import FrameSender, Sender

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from llm_datadist.core.geometry import U64
    from llm_datadist.engine.context import Context
    from llm_datadist.engine.control import Control

_CHUNK_NBYTES = 256 * 1024
#: larger answers would keep the loop's thread from its other peers
_INLINE_NBYTES = 256 * 1024
#: a peer that takes no more of an answer for this long, or asks for longer, is cut off
MAX_ANSWER_S = 600.0


class StreamService:
    """Answers the requests that come on one connection. Lives in the loop's thread."""

    def __init__(
        self,
        control: Control,
        context: Context,
        fetch: Callable[[m.Fetch], None],
        when_closed: Callable[[StreamService], None],
        count: Callable[[U64], None] | None,
    ) -> None:
        """`count` is told the lengths of what peers are sent, where that is counted."""
        self._socket = control.socket
        self._shield = control.shield
        self._frames = control.frames
        self._frames.max_nbytes = m.MAX_BODY_NBYTES
        self._context = context
        self._loop = context.loop
        self._fetch = fetch
        self._when_closed = when_closed
        self._count = count
        self._is_busy = False
        self._is_closed = False
        #: runs while the peer takes no more of an answer
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._loop.add_reader(self._socket, self._readable)
        self._serve()  # a request may have come with the last message of the hand-shake

    def close(self) -> None:
        """Ends the service; a worker that is sending notices by itself."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._socket)
        if self._timer is not None:
            self._end_wait(self._timer)
            self._is_busy = False
        if self._is_busy:
            _shutdown(self._socket)  # the worker still holds the descriptor: _resume closes it
        else:
            self._socket.close()
        self._when_closed(self)

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_CHUNK_NBYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        try:
            self._frames.feed(self._shield.open(data))
        except NotAuthentic as error:
            get_logger().warning("closing a stream of a peer: %s", error)
            self.close()
            return
        self._serve()

    def _serve(self) -> None:
        try:
            for request in self._frames:
                self._answer(request)
                if self._is_busy or self._is_closed:
                    return
        except (m.ProtocolError, OSError) as error:
            get_logger().warning("closing a stream of a peer: %s", error)
            self.close()

    def _answer(self, request: m.AnyMessage) -> None:
        if isinstance(request, m.Fetch):
            self._pause()
            self._context.fetchers.submit(self._work_and_answer, partial(self._fetched, request))
            return
        if isinstance(request, m.ListExports):
            self._pause()
            self._context.workers.submit(self._work_and_answer, partial(self._exports, request))
            return
        if isinstance(request, m.Digest):
            self._pause()
            self._context.workers.submit(self._work_and_answer, partial(self._digested, request))
            return
        answer, timeout_s = self._prepare(request)
        sender = sealed(answer, self._socket, self._shield)
        if sender.nbytes > _INLINE_NBYTES or not sender.advance():
            self._pause()
            self._context.workers.submit(self._finish, sender, Deadline.after(timeout_s))

    def _prepare(self, request: m.AnyMessage) -> tuple[FrameSender, float]:
        """The answer, and the seconds that sending it may take. Raises ProtocolError."""
        sock, catalog = self._socket, self._context.catalog
        try:
            if isinstance(request, m.Read):
                entry, addrs, nbytes = catalog.readable(request)
                if self._count is not None and request.cache_id != PROBE_ID:
                    self._count(nbytes)
                timeout_s = min(request.timeout_ms / 1000, MAX_ANSWER_S)
                return Sender(sock, addrs, nbytes, entry.word_addr), timeout_s
            return FrameSender(sock, catalog.answer(request)), MAX_ANSWER_S
        except LLMException as error:
            return FrameSender(sock, _refusal(error)), MAX_ANSWER_S
        except ValueError as error:  # an answer beyond the cap of a frame
            return FrameSender(sock, m.Refused(LLMStatusCode.LLM_FAILED, str(error))), MAX_ANSWER_S

    def _exports(self, request: m.ListExports) -> m.Message:
        path = request.path
        transport = self._context.transports.get(path)
        if transport is None:
            raise invalid(f"cluster {self._context.me.cluster_id} does not have the path {path!r}")
        return m.Exports(transport.exports())

    def _pause(self) -> None:
        """Another thread has the socket now, until `_resume`."""
        self._is_busy = True
        self._loop.remove_reader(self._socket)

    def _fetched(self, request: m.Fetch) -> m.Message:
        self._fetch(request)
        return m.Done()

    def _digested(self, request: m.Digest) -> m.Message:
        _, addrs, nbytes = self._context.catalog.readable(request)
        timeout_s = min(request.timeout_ms / 1000, MAX_ANSWER_S)
        return m.Digested(digest_of(addrs, nbytes, Deadline.after(timeout_s)))

    def _work_and_answer(self, work: Callable[[], m.Message]) -> None:
        """In a thread of the fetchers or workers."""
        try:
            answer = work()
        except LLMException as error:
            answer = _refusal(error)
        except m.ProtocolError as error:
            self._loop.call_soon_threadsafe(self._resume, str(error))
            return
        sender = FrameSender(self._socket, answer)
        self._finish(sealed(sender, self._socket, self._shield), Deadline.after(MAX_ANSWER_S))

    def _finish(self, sender: FrameSender, deadline: Deadline) -> None:
        """In a thread of the workers or fetchers."""
        try:
            if not sender.finish(deadline):
                self._loop.call_soon_threadsafe(self._wait, sender, deadline)
                return
        except (OSError, LLMException) as error:
            failure = _describe(error)
        else:
            failure = ""
        self._loop.call_soon_threadsafe(self._resume, failure)

    def _wait(self, sender: FrameSender, deadline: Deadline) -> None:
        """For a peer that takes no more at present, without a thread: others need them."""
        if self._is_closed:
            self._socket.close()
            return
        left_s = max(0.0, deadline.remaining_s())
        self._timer = self._loop.call_later(left_s, lambda: self._go_on(sender, deadline))
        self._loop.add_writer(self._socket, self._go_on, sender, deadline)

    def _go_on(self, sender: FrameSender, deadline: Deadline) -> None:
        if self._timer is not None:
            self._end_wait(self._timer)
            self._context.workers.submit(self._finish, sender, deadline)

    def _end_wait(self, timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        self._timer = None
        self._loop.remove_writer(self._socket)

    def _resume(self, failure: str) -> None:
        self._is_busy = False
        if self._is_closed:
            self._socket.close()
        elif failure:
            get_logger().warning("closing a stream of a peer: %s", failure)
            self.close()
        else:
            self._loop.add_reader(self._socket, self._readable)
            self._serve()


def _refusal(error: LLMException) -> m.Refused:
    return m.Refused(error.status_code, m.as_text(str(error)))


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ECONNRESET):
        return "the peer closed it in the middle of an answer"
    return str(error)


def _shutdown(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # the peer was first
        return
