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

import asyncio
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
from llm_datadist.transport.sealed import framed, sealed
from llm_datadist.transport.shield import NotAuthentic
from llm_datadist.transport.tcp import FrameSender, Permit, Sender

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.core.frames import FrameReader
    from llm_datadist.core.segments import U64
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.owner.answers import Answers
    from llm_datadist.owner.fetching import Arrival, Fetching
    from llm_datadist.peer.peer import Peer
    from llm_datadist.running.gate import Gate
    from llm_datadist.running.threads import Threads
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
    gate: Gate
    #: threads that send large answers
    workers: Threads
    #: threads that fetch what peers push
    fetchers: Threads
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
        #: the answer that waits for the peer, without a thread; until when
        self._waiting: tuple[FrameSender, Deadline] | None = None
        self._timer: asyncio.TimerHandle | None = None
        #: in the gate while an answer reads a cache of ours
        self._token: object = None

    def start(self) -> None:
        self._loop.add_reader(self._socket, self._readable)
        self._serve()  # a request may have come with the last message of the hand-shake

    def close(self) -> None:
        """Ends the service; a worker that is sending notices by itself."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._socket)
        if self._waiting is not None:
            self._end_wait()
            self._is_busy = False
        if self._is_busy:
            _shutdown(self._socket)  # the worker still holds the descriptor: _resume closes it
        else:
            self._serving.gate.leave(self._token)
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
        except Exception:  # whatever it is, the peer must not wait for it
            get_logger().exception("answering a peer failed")
            self.close()

    def _answer(self, request: m.AnyMessage) -> None:
        serving = self._serving
        if isinstance(request, m.Fetch):
            arrival = serving.fetching.arrive(request)
            if not self._work(serving.fetchers, partial(self._fetched, arrival)):
                serving.fetching.depart(arrival)
        elif isinstance(request, m.ListExports):
            self._work(serving.workers, partial(serving.answers.exports, request))
        elif isinstance(request, m.Digest):
            self._work(serving.workers, partial(serving.answers.digest, request))
        elif isinstance(request, m.Read):
            timeout_s = min(request.timeout_ms / 1000, MAX_ANSWER_S)
            self._send(self._read(request), Deadline.after(timeout_s))
        else:
            answer = self._made(partial(serving.answers.answer, request))
            self._send(answer, Deadline.after(MAX_ANSWER_S))

    def _read(self, request: m.Read) -> FrameSender:
        """What a peer asks to be sent, as it lies in memory. Raises ProtocolError."""
        serving, token = self._serving, object()
        permit = Permit(partial(serving.gate.leave, token), self._wake)
        try:
            entry, addrs, nbytes = serving.answers.readable(token, request, permit)
        except LLMException as error:
            serving.gate.leave(token)
            return self._sender_of(_refusal(error))
        self._token = token
        if serving.recorder is not None and not serving.answers.is_probe(request):
            self._count(serving.recorder, nbytes)
        frame = framed(m.Sending(int(nbytes.sum())), self._shield)
        return Sender(self._socket, frame, addrs, nbytes, entry.word_addr, permit)

    def _sender_of(self, message: m.Message) -> FrameSender:
        return FrameSender(self._socket, framed(message, self._shield))

    def _made(self, work: Callable[[], m.Message]) -> FrameSender:
        """What work answers, or why it cannot. Raises ProtocolError.

        What nobody has thought of is said, too: the peer would wait until its deadline.
        """
        try:
            return self._sender_of(work())
        except LLMException as error:
            return self._sender_of(_refusal(error))
        except m.ProtocolError:
            raise
        except Exception as error:
            get_logger().exception("answering a peer failed")
            text = m.as_text(f"the peer cannot answer: {type(error).__name__}: {error}")
            return self._sender_of(m.Refused(LLMStatusCode.LLM_FAILED, text))

    def _send(self, answer: FrameSender, deadline: Deadline) -> None:
        """At once, if that is quick; else in a thread of the workers."""
        sender = sealed(answer, self._socket, self._shield)
        if sender.nbytes <= _INLINE_NBYTES and sender.advance():
            self._serving.gate.leave(self._token)
            return
        self._pause()
        self._hand_over(sender, deadline)

    def _count(self, recorder: Recorder, nbytes: U64) -> None:
        """What a peer reads from us by asking."""
        peer = self._peer()
        if peer is not None:
            series = recorder.series("serve", peer.cluster_id, peer.path)
            series.add((NEVER, NEVER, NEVER, NEVER, 1, int(nbytes.sum()), len(nbytes)))

    def _fetched(self, arrival: Arrival) -> m.Message:
        peer, fetching = self._peer(), self._serving.fetching
        try:
            if peer is None:
                raise LLMException("the link is still being made", LLMStatusCode.LLM_NOT_YET_LINK)
            return fetching.fetch(arrival, peer)
        finally:
            fetching.depart(arrival)

    def _pause(self) -> None:
        """Another thread has the socket now, until `_resume`."""
        self._is_busy = True
        self._loop.remove_reader(self._socket)

    def _work(self, threads: Threads, work: Callable[[], m.Message]) -> bool:
        """Whether a thread does it; else the peer is told why not."""
        self._pause()
        try:
            threads.start(partial(self._work_and_answer, work))
        except LLMException as error:  # no thread is to be had: said at once
            self._is_busy = False
            self._loop.add_reader(self._socket, self._readable)
            self._send(self._sender_of(_refusal(error)), Deadline.after(MAX_ANSWER_S))
            return False
        return True

    def _work_and_answer(self, work: Callable[[], m.Message]) -> None:
        """In a thread of the fetchers or workers."""
        try:
            sender = sealed(self._made(work), self._socket, self._shield)
        except m.ProtocolError as error:
            self._loop.call_soon_threadsafe(self._resume, str(error))
            return
        self._finish(sender, Deadline.after(MAX_ANSWER_S))

    def _hand_over(self, sender: FrameSender, deadline: Deadline) -> None:
        """The rest of an answer goes to a thread, or bit by bit from here where there is none."""
        try:
            self._serving.workers.start(partial(self._finish, sender, deadline))
        except LLMException:
            try:
                is_sent = sender.advance()
            except OSError as error:
                self._resume(_describe(error))
            else:
                self._resume("") if is_sent else self._wait(sender, deadline)

    def _finish(self, sender: FrameSender, deadline: Deadline) -> None:
        """In a thread of the workers or fetchers."""
        try:
            if not sender.finish(deadline):
                self._loop.call_soon_threadsafe(self._wait, sender, deadline)
                return
        except (OSError, LLMException) as error:
            failure = _describe(error)
        except Exception as error:  # whatever it is, the peer must not wait for it
            get_logger().exception("answering a peer failed")
            failure = f"{type(error).__name__}: {error}"
        else:
            failure = ""
        self._loop.call_soon_threadsafe(self._resume, failure)

    def _wait(self, sender: FrameSender, deadline: Deadline) -> None:
        """For a peer that takes no more at present, without a thread: others need them."""
        if self._is_closed:
            self._serving.gate.leave(self._token)
            self._socket.close()
            return
        self._waiting = sender, deadline
        left_s = max(0.0, deadline.remaining_s())
        self._timer = self._loop.call_later(left_s, self._go_on)
        self._loop.add_writer(self._socket, self._go_on)
        self._look()

    def _wake(self) -> None:
        """In any thread; a finalizer may be in the loop's, which then must not wait for itself."""
        if asyncio._get_running_loop() is self._loop:
            self._look()
        else:
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        """Lets go of memory that was taken back from an answer which waits for the peer."""
        if self._waiting is not None:
            try:
                self._waiting[0].look()
            except OSError as error:
                get_logger().warning("closing a stream of a peer: %s", _describe(error))
                self.close()

    def _go_on(self) -> None:
        if self._waiting is not None:
            self._hand_over(*self._end_wait())

    def _end_wait(self) -> tuple[FrameSender, Deadline]:
        assert self._waiting is not None
        assert self._timer is not None
        waiting, self._waiting = self._waiting, None
        self._timer.cancel()
        self._loop.remove_writer(self._socket)
        return waiting

    def _resume(self, failure: str) -> None:
        self._is_busy = False
        self._serving.gate.leave(self._token)
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
