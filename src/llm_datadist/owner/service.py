"""Serving: the answering end of a request stream, driven by the cluster's loop.

Guaranteed: requests of a stream are answered in order, one at a time, and links have the loop's
thread by turns, however many streams they have; it never waits, and no peer keeps a thread by
taking nothing. Small answers are sent at once in the loop's thread. Others go to a thread of the
workers (large answers, tables, checksums) or of the fetchers (what peers push), and the stream is
not listened to meanwhile. What takes long there gives its thread to other peers after a while, and
goes on when it is its turn again (`running/shares.py`). A peer that takes nothing of an answer is
waited for in the loop.

As long as the link is being made only what the hand-shake needs is answered (`Answers.is_early`).

All state belongs to the loop's thread. While `_is_busy` the socket is another thread's, which gives
it back by `_resume` or `_wait`; a close meanwhile only shuts the socket down, since a descriptor
that is closed under a thread may be somebody else's by its next call. Rejected: one thread for each
stream (a thousand peers), and answers in the loop's thread (one slow peer would stop all).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.observe.log import get_logger
from llm_datadist.observe.recorder import NEVER
from llm_datadist.owner.answers import MAX_ANSWER_S
from llm_datadist.owner.checking import Checking
from llm_datadist.running.deadline import Deadline
from llm_datadist.transport import ktls
from llm_datadist.transport.sealed import framed, sealed
from llm_datadist.transport.shield import NotAuthentic
from llm_datadist.transport.tcp import FrameSender, Permit, Sender

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.core.frames import FrameReader
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.owner.answers import Answers
    from llm_datadist.owner.fetching import Arrival, Fetching
    from llm_datadist.owner.guest import Guest
    from llm_datadist.owner.notices import Notices
    from llm_datadist.running.gate import Gate
    from llm_datadist.running.shares import LoopShares, Shares
    from llm_datadist.transport.shield import Shield

_CHUNK_NBYTES = 256 * 1024
#: larger answers would keep the loop's thread from its other peers
_INLINE_NBYTES = 256 * 1024
#: so long a stream may have the loop's thread, where no other is to be had
_TURN_S = 0.01
#: the word that the link is made is at most so far behind the first request
_EARLY_S = 1.0


@dataclass(frozen=True)
class Serving:
    """What all services of a cluster share."""

    loop: asyncio.AbstractEventLoop
    answers: Answers
    fetching: Fetching
    #: what peers tell our program
    notices: Notices
    gate: Gate
    #: threads that send large answers
    workers: Shares
    #: … and that make checksums, which keep the interpreter from others where pieces are small
    checkers: Shares
    #: threads that fetch what peers push
    fetchers: Shares
    #: the loop's thread
    turns: LoopShares
    #: a peer that takes nothing of an answer for so long is cut off: as long as calls of ours last
    timeout_s: float
    #: None when metrics are off
    recorder: Recorder | None
    #: what comes is received here, in the loop's thread: to map and unmap so much for each request
    #: took longer than to answer it
    room: memoryview = field(default_factory=lambda: memoryview(bytearray(_CHUNK_NBYTES)))


class StreamService:
    """Answers the requests that come on one connection. Lives in the loop's thread."""

    def __init__(
        self,
        sock: socket.socket,
        shield: Shield,
        frames: FrameReader,
        serving: Serving,
        guest: Guest,
        when_closed: Callable[[StreamService], None],
    ) -> None:
        """The guest is who asks."""
        self._socket = sock
        self._shield = shield
        self._frames = frames
        self._serving = serving
        self._loop = serving.loop
        self._guest = guest
        self._when_closed = when_closed
        self._is_busy = False
        self._is_closed = False
        #: something has come, and it is not the link's turn yet
        self._has_turn = False
        #: what came before the link was made, and is put off
        self._early: m.AnyMessage | None = None
        #: the answer that waits for the peer, without a thread; until when
        self._waiting: tuple[FrameSender, Deadline] | None = None
        self._timer: asyncio.TimerHandle | None = None
        #: how long it looked away last from a connection that had nothing whole
        self._pause_s = 0.0
        #: in the gate while an answer reads a cache of ours
        self._token: object = None

    def start(self) -> None:
        self._loop.add_reader(self._socket, self._readable)
        self._go_on_serving()  # a request may have come with the last message of the hand-shake

    def close(self) -> None:
        """Ends the service; a worker that is sending notices by itself."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._socket)
        self._guest.has_table(self)
        if self._waiting is not None:
            self._end_wait()
            self._is_busy = False
        if self._is_busy:
            _shutdown(self._socket)  # the worker still holds the descriptor: _resume closes it
        else:
            self._serving.gate.leave(self._token)
            self._socket.close()
        self._when_closed(self)
        self._serving.fetching.look()

    def _complain(self, why: object) -> None:
        """A peer may break streams as often as it likes: a warning a minute says enough."""
        level = logging.WARNING if self._guest.may_warn() else logging.DEBUG
        get_logger().log(level, "closing a stream of a peer: %s", why)

    def _readable(self) -> None:
        if not self._has_turn:
            self._has_turn = True
            self._serving.turns.start(self._guest, self._take_turn)

    def _take_turn(self) -> None:
        """Answers one request, and reads a little if none is whole."""
        self._has_turn = False
        if self._is_busy or self._is_closed or self._early is not None:
            return
        self._frames.max_nbytes = self._guest.max_request_nbytes
        try:
            request = next(iter(self._frames), None)
            if request is None and self._receive():
                request = next(iter(self._frames), None)
            if request is not None:
                self._answer(request)
        except (m.ProtocolError, NotAuthentic, OSError) as error:
            self._complain(error)
            self.close()
            return
        except Exception:  # whatever it is, the peer must not wait for it
            get_logger().exception("answering a peer failed")
            self.close()
            return
        if request is not None:
            self._go_on_serving()

    def _go_on_serving(self) -> None:
        """More requests may have come than were answered."""
        if not (self._frames.is_empty or self._is_busy or self._is_closed):
            self._readable()

    def _receive(self) -> bool:
        """Whether something has come. Raises NotAuthentic, OSError."""
        room = self._serving.room
        try:
            got = self._socket.recv_into(room)
        except BlockingIOError:
            self._look_away()
            return False
        except OSError as error:
            if reason := ktls.why_broken(self._shield, error):
                raise NotAuthentic(reason) from error
            got = 0
        self._pause_s = 0.0
        if not got:
            self.close()
            return False
        self._frames.feed(self._shield.open(room[:got], self._frames.max_nbytes))
        return True

    def _look_away(self) -> None:
        """From what the kernel would say again and again: that a part of a record has come."""
        if self._shield.kernels is not None:
            self._pause_s = ktls.longer_s(self._pause_s)
            self._loop.remove_reader(self._socket)
            self._loop.call_later(self._pause_s, self._look_again)

    def _look_again(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._socket, self._readable)

    def _put_off(self, request: m.AnyMessage) -> None:
        """The link may be made, and the word of it be on its way."""
        self._early = request
        self._loop.remove_reader(self._socket)
        self._guest.when_linked(self._take_up)
        self._loop.call_later(_EARLY_S, self._take_up)

    def _take_up(self) -> None:
        request, self._early = self._early, None
        if request is None or self._is_closed:
            return
        self._loop.add_reader(self._socket, self._readable)
        try:
            self._answer(request, is_late=True)
        except (m.ProtocolError, OSError) as error:
            self._complain(error)
            self.close()
            return
        except Exception:  # as above; and the others that were put off must not wait, either
            get_logger().exception("answering a peer failed")
            self.close()
            return
        self._go_on_serving()

    def _answer(self, request: m.AnyMessage, *, is_late: bool = False) -> None:
        """`is_late`: it was put off. Raises ProtocolError, OSError."""
        serving, guest = self._serving, self._guest
        if guest.peer is None and not serving.answers.is_early(request):
            if guest.was_called and not is_late:
                self._put_off(request)
            else:
                self._send(self._sender_of(_NOT_YET), Deadline.after(MAX_ANSWER_S))
        elif isinstance(request, m.Fetch):
            self._begin_fetch(request)
        elif serving.answers.is_table(request):
            if guest.takes_table(self):
                self._work(serving.workers, partial(serving.answers.table, request))
            else:
                self._send(self._sender_of(_TOO_MANY_TABLES), Deadline.after(MAX_ANSWER_S))
        elif isinstance(request, m.Digest):
            self._begin_digest(request)
        elif isinstance(request, m.Read):
            timeout_s = min(request.timeout_ms / 1000, MAX_ANSWER_S)
            self._send(self._read(request), Deadline.after(timeout_s))
        elif isinstance(request, m.Notify):
            answer = self._made(partial(serving.notices.keep, guest, request))
            assert answer is not None
            self._send(answer, Deadline.after(MAX_ANSWER_S))
        else:
            answer = self._made(partial(serving.answers.answer, request))
            assert answer is not None
            self._send(answer, Deadline.after(MAX_ANSWER_S))

    def _begin_fetch(self, request: m.Fetch) -> None:
        """Raises ProtocolError."""
        serving = self._serving
        try:
            arrival = serving.fetching.arrive(request)
        except LLMException as error:
            self._send(self._sender_of(_refusal(error)), Deadline.after(MAX_ANSWER_S))
            return
        is_begun = False
        try:
            is_begun = self._work(serving.fetchers, partial(self._fetched, arrival))
        finally:  # also when the peer is gone that is to be told why not
            if not is_begun:
                serving.fetching.depart(arrival)

    def _read(self, request: m.Read) -> FrameSender:
        """What a peer asks to be sent, as it lies in memory. Raises ProtocolError."""
        serving, token = self._serving, object()
        permit = Permit(partial(serving.gate.leave, token), self._wake)
        try:
            entry, addrs, nbytes, total_nbytes = serving.answers.readable(
                token, request, permit, self._guest.peer
            )
        except LLMException as error:
            serving.gate.leave(token)
            return self._sender_of(_refusal(error))
        self._token = token
        if serving.recorder is not None and not serving.answers.is_probe(request):
            self._count(serving.recorder, total_nbytes, len(nbytes))
        frame = framed(m.Sending(total_nbytes), self._shield)
        return Sender(self._socket, frame, addrs, nbytes, total_nbytes, entry.word_addr, permit)

    def _begin_digest(self, request: m.Digest) -> None:
        """Raises ProtocolError."""
        serving = self._serving
        deadline = serving.fetching.deadline_of(request.timeout_ms)
        checking = Checking(serving.gate, deadline, lambda: self._is_closed)
        try:
            checking.begin(serving.answers, request, self._guest.peer)
        except LLMException as error:
            checking.end()
            self._send(self._sender_of(_refusal(error)), Deadline.after(MAX_ANSWER_S))
            return
        self._token = checking
        self._work(serving.checkers, checking.go_on)

    def _sender_of(self, message: m.Message) -> FrameSender:
        return FrameSender(self._socket, framed(message, self._shield))

    def _made(self, work: Callable[[], m.Message | None]) -> FrameSender | None:
        """What work answers, or why it cannot; None when it is not done. Raises ProtocolError.

        What nobody has thought of is said, too: the peer would wait until its deadline.
        """
        try:
            message = work()
            return None if message is None else self._sender_of(message)
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
            self._shield.rest()
            return
        self._pause()
        self._hand_over(sender, deadline)

    def _count(self, recorder: Recorder, nbytes: int, num_segments: int) -> None:
        """What a peer reads from us by asking."""
        peer = self._guest.peer
        if peer is not None:
            series = recorder.series("serve", peer.cluster_id, peer.path)
            series.add((NEVER, NEVER, NEVER, NEVER, 1, nbytes, num_segments))

    def _fetched(self, arrival: Arrival) -> m.Message:
        peer, fetching = self._guest.peer, self._serving.fetching
        assert peer is not None
        try:
            return fetching.fetch(arrival, peer)
        finally:
            fetching.depart(arrival)

    def _pause(self) -> None:
        """Another thread has the socket now, until `_resume`."""
        self._is_busy = True
        self._loop.remove_reader(self._socket)

    def _work(self, threads: Shares, work: Callable[[], m.Message | None]) -> bool:
        """Whether a thread does it; else the peer is told why not."""
        self._pause()
        try:
            threads.start(self._guest, partial(self._work_and_answer, threads, work))
        except LLMException as error:  # no thread is to be had: said at once
            self._is_busy = False
            self._guest.has_table(self)
            self._loop.add_reader(self._socket, self._readable)
            self._send(self._sender_of(_refusal(error)), Deadline.after(MAX_ANSWER_S))
            return False
        return True

    def _work_and_answer(self, threads: Shares, work: Callable[[], m.Message | None]) -> None:
        """In a thread of the fetchers or workers. What takes long goes behind what others want."""
        try:
            while (answer := self._made(work)) is None:
                with suppress(LLMException):  # no thread is to be had: it goes on in this one
                    threads.start(self._guest, partial(self._work_and_answer, threads, work))
                    return
            sender = sealed(answer, self._socket, self._shield)
        except m.ProtocolError as error:
            self._loop.call_soon_threadsafe(self._resume, str(error))
            return
        self._finish(sender, Deadline.after(MAX_ANSWER_S))

    def _hand_over(self, sender: FrameSender, deadline: Deadline) -> None:
        """The rest of an answer goes to a thread, or bit by bit from here where there is none."""
        try:
            self._serving.workers.start(self._guest, partial(self._finish, sender, deadline))
        except LLMException:
            try:
                is_sent = sender.advance(time.monotonic() + _TURN_S)
            except OSError as error:
                self._resume(_describe(error, self._shield))
            else:
                self._resume("") if is_sent else self._wait(sender, deadline)

    def _finish(self, sender: FrameSender, deadline: Deadline) -> None:
        """In a thread of the workers or fetchers."""
        try:
            if not sender.finish(deadline):
                self._loop.call_soon_threadsafe(self._wait, sender, deadline)
                return
        except (OSError, LLMException) as error:
            failure = _describe(error, self._shield)
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
        left_s = min(self._serving.timeout_s, max(0.0, deadline.remaining_s()))
        self._timer = self._loop.call_later(left_s, self._give_up)
        self._loop.add_writer(self._socket, self._go_on)
        self._look()

    def _wake(self) -> None:
        """In any thread; a finalizer may be in the loop's, which then must not wait for itself."""
        if asyncio._get_running_loop() is self._loop:
            self._look()
            return
        try:
            self._loop.call_soon_threadsafe(self._look)
        except RuntimeError:
            if not self._loop.is_closed():  # else nobody sends any more
                raise

    def _look(self) -> None:
        """Lets go of memory that was taken back from an answer which waits for the peer."""
        if self._waiting is not None:
            try:
                self._waiting[0].look()
            except OSError as error:
                self._complain(_describe(error, self._shield))
                self.close()

    def _give_up(self) -> None:
        self._complain("it has taken nothing of an answer for too long")
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
        self._guest.has_table(self)
        self._serving.gate.leave(self._token)
        if self._is_closed:
            self._socket.close()
        elif failure:
            self._complain(failure)
            self.close()
        else:
            self._loop.add_reader(self._socket, self._readable)
            self._go_on_serving()


_NOT_YET = m.Refused(LLMStatusCode.LLM_NOT_YET_LINK, "the link is still being made")
_TOO_MANY_TABLES = m.Refused(
    LLMStatusCode.LLM_FAILED, "too many tables are being made or sent to this peer already"
)


def _refusal(error: LLMException) -> m.Refused:
    return m.Refused(error.status_code, m.as_text(str(error)))


def _describe(error: Exception, shield: Shield) -> str:
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ECONNRESET):
        return "the peer closed it in the middle of an answer"
    if isinstance(error, OSError) and (reason := ktls.why_broken(shield, error)):
        return reason
    return str(error)


def _shutdown(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # the peer was first
        return
