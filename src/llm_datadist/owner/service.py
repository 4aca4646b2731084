"""Serving: the answering end of a request stream, driven by the cluster's loop.

Guaranteed: requests of a stream are answered in order, one at a time; the loop's thread never
waits, and no peer keeps a thread by taking nothing. Small answers are sent at once in the loop's
thread. Others go to a thread of the workers (large answers, checksums) or of the fetchers (what
peers push), and the stream is not listened to meanwhile. A peer that takes nothing of an answer for
a while gives the thread back to others, and is waited for in the loop.

All state belongs to the loop's thread. While `_is_busy` the socket is another thread's, which gives
it back by `_resume` or `_wait`; a close meanwhile only shuts the socket down, since a descriptor
that is closed under a thread may be somebody else's by its next call. Rejected: one thread for each
stream (a thousand peers), and answers in the loop's thread (one slow peer would stop all).
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.observe.log import get_logger
from llm_datadist.observe.recorder import NEVER
from llm_datadist.owner.answers import MAX_ANSWER_S
from llm_datadist.running.deadline import Deadline
from llm_datadist.transport.sealed import sealed
from llm_datadist.transport.shield import NotAuthentic
from llm_datadist.transport.tcp import FrameSender, Sender

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from concurrent.futures import Executor

    from llm_datadist.core.frames import FrameReader
    from llm_datadist.core.segments import U64
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.owner.answers import Answers
    from llm_datadist.owner.fetching import Fetching
    from llm_datadist.peer.peer import Peer
    from llm_datadist.transport.shield import Shield

_CHUNK_NBYTES = 256 * 1024
#: larger answers would keep the loop's thread from its other peers
_INLINE_NBYTES = 256 * 1024


@dataclass(frozen=True)
class Serving:
    """What all services of a cluster share."""

    loop: asyncio.AbstractEventLoop
    answers: Answers
    fetching: Fetching
    #: threads that send large answers
    workers: Executor
    #: threads that fetch what peers push
    fetchers: Executor
    #: None when metrics are off
    recorder: Recorder | None


class StreamService:
    """Answers the requests that come on one connection. Lives in the loop's thread."""

    def __init__(
        self,
        sock: socket.socket,
        shield: Shield,
        frames: FrameReader,
        serving: Serving,
        peer: Callable[[], Peer | None],
        when_closed: Callable[[StreamService], None],
    ) -> None:
        """`peer` is who asks; None while the link is still being made."""
        self._socket = sock
        self._shield = shield
        self._frames = frames
        self._frames.max_nbytes = m.MAX_BODY_NBYTES
        self._serving = serving
        self._loop = serving.loop
        self._peer = peer
        self._when_closed = when_closed
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
        serving = self._serving
        if isinstance(request, m.Fetch):
            self._work(serving.fetchers, partial(self._fetched, request))
        elif isinstance(request, m.ListExports):
            self._work(serving.workers, partial(serving.answers.exports, request))
        elif isinstance(request, m.Digest):
            self._work(serving.workers, partial(serving.answers.digest, request))
        else:
            answer, timeout_s = self._prepare(request)
            sender = sealed(answer, self._socket, self._shield)
            if sender.nbytes > _INLINE_NBYTES or not sender.advance():
                self._pause()
                serving.workers.submit(self._finish, sender, Deadline.after(timeout_s))

    def _prepare(self, request: m.AnyMessage) -> tuple[FrameSender, float]:
        """The answer, and the seconds that sending it may take. Raises ProtocolError."""
        sock, answers = self._socket, self._serving.answers
        try:
            if isinstance(request, m.Read):
                entry, addrs, nbytes = answers.readable(request)
                if self._serving.recorder is not None and not answers.is_probe(request):
                    self._count(self._serving.recorder, nbytes)
                timeout_s = min(request.timeout_ms / 1000, MAX_ANSWER_S)
                return Sender(sock, addrs, nbytes, entry.word_addr), timeout_s
            return FrameSender(sock, answers.answer(request)), MAX_ANSWER_S
        except LLMException as error:
            return FrameSender(sock, _refusal(error)), MAX_ANSWER_S
        except ValueError as error:  # an answer beyond the cap of a frame
            return FrameSender(sock, m.Refused(LLMStatusCode.LLM_FAILED, str(error))), MAX_ANSWER_S

    def _count(self, recorder: Recorder, nbytes: U64) -> None:
        """What a peer reads from us by asking."""
        peer = self._peer()
        if peer is not None:
            series = recorder.series("serve", peer.cluster_id, peer.path)
            series.add((NEVER, NEVER, NEVER, NEVER, 1, int(nbytes.sum()), len(nbytes)))

    def _fetched(self, request: m.Fetch) -> m.Message:
        peer = self._peer()
        if peer is None:
            raise LLMException("the link is still being made", LLMStatusCode.LLM_NOT_YET_LINK)
        return self._serving.fetching.fetch(request, peer)

    def _pause(self) -> None:
        """Another thread has the socket now, until `_resume`."""
        self._is_busy = True
        self._loop.remove_reader(self._socket)

    def _work(self, threads: Executor, work: Callable[[], m.Message]) -> None:
        self._pause()
        threads.submit(self._work_and_answer, work)

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
            self._serving.workers.submit(self._finish, sender, deadline)

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
