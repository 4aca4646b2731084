"""The request streams of one link: opened when needed, kept, and closed with the link.

Guaranteed: a stream is lent to one thread at a time; one that an exchange failed on is closed; with
the link all are closed, and whoever waits for one is told why. Any thread may borrow.

The end that was called cannot dial, so it asks its peer to, and the stream comes later by `add`.
Whoever waits may find that another thread took what came, even the stream that it asked the peer
for itself. So nobody waits for a stream of its own: the pool counts how many threads want one and
how many are under way, and any thread opens, for all that wait, as many as are missing. Rejected: a
request by each thread (one whose stream another one took and lost waited in vain).

`_changed` guards everything; a stream is opened, asked and closed without it.
"""

from __future__ import annotations

import socket
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.transport.base import StaleCache
from llm_datadist.transport.sealed import open_stream
from llm_datadist.transport.stream import RequestRefused, Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.endpoint import Endpoint
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.transport.shield import Shields

#: more threads than this on one link wait for each other's streams
MAX_STREAMS = 16


class Loan:
    """A stream that is lent, to be given back by `with`."""

    __slots__ = ("_pool", "_stream")

    def __init__(self, pool: StreamPool, stream: Stream) -> None:
        self._pool = pool
        self._stream = stream

    def __enter__(self) -> Stream:
        return self._stream

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._pool.end_loan(self._stream, error)


class StreamPool:
    """Lends streams, one thread each. Thread-safe.

    `open_one` either returns a new stream at once, or asks the peer to dial and returns None; the
    stream then comes by `add`.
    """

    def __init__(
        self, open_one: Callable[[Deadline], Stream | None], recorder: Recorder | None = None
    ) -> None:
        self._open_one = open_one
        self._recorder = recorder
        self._changed = threading.Condition()
        self._idle: list[Stream] = []
        self._lent: set[Stream] = set()
        #: threads that have no stream yet
        self._wanting = 0
        #: streams that are under way for them
        self._opening = 0
        self._closed_because: str | None = None

    def borrow(self, deadline: Deadline) -> Loan:
        """A stream for one exchange. One that an exchange fails on is closed, not given back."""
        return Loan(self, self._take(deadline))

    def end_loan(self, stream: Stream, error: BaseException | None) -> None:
        # a complete exchange may have a bad outcome
        if error is None or isinstance(error, RequestRefused | StaleCache):
            self._give_back(stream)
        else:
            self._drop(stream)

    def add(self, stream: Stream) -> None:
        """A stream that the peer dialled for us."""
        with self._changed:
            self._opening = max(0, self._opening - 1)
            if self._closed_because is not None:
                stream.close()
                return
            self._idle.append(stream)
            self._changed.notify()

    def close(self, because: str) -> None:
        """Ends all streams; whoever waits on one gets LLM_NOT_YET_LINK."""
        with self._changed:
            self._closed_because = because
            for stream in self._lent:
                stream.shutdown()
            for stream in self._idle:
                stream.close()
            self._idle.clear()
            self._changed.notify_all()

    def _take(self, deadline: Deadline) -> Stream:
        with self._changed:
            if self._idle:
                return self._lend(self._idle.pop())
            self._wanting += 1
        try:
            while True:
                stream = self._next_idle(deadline) or self._open(deadline)
                if stream is not None:
                    return stream
        finally:
            with self._changed:
                self._wanting -= 1

    def _next_idle(self, deadline: Deadline) -> Stream | None:
        """Waits for an idle stream; None when this thread is to open one, which is counted.

        Whoever wakes may find that another thread took what came, even the stream that it asked the
        peer for: so any thread opens, for all that wait, as many as are not under way.
        """
        with self._changed:
            while not self._idle:
                self._require_open()
                has_room = len(self._lent) + self._opening < MAX_STREAMS
                if has_room and self._opening < self._wanting:
                    self._opening += 1
                    return None
                try:
                    self._wait(deadline)
                except LLMException:
                    self._opening = min(self._opening, self._wanting - 1)  # one may never come
                    self._changed.notify()  # this thread may have been woken in another's place
                    raise
            return self._lend(self._idle.pop())

    def _open(self, deadline: Deadline) -> Stream | None:
        """A new stream; None when the peer was asked for one."""
        try:
            stream = self._open_one(deadline)
        except BaseException:
            with self._changed:
                self._opening -= 1
                self._changed.notify()
            raise
        if stream is None:
            return None
        with self._changed:
            self._opening -= 1
            return self._lend(stream)

    def _lend(self, stream: Stream) -> Stream:
        self._lent.add(stream)
        if self._closed_because is not None:
            stream.shutdown()
        return stream

    def _give_back(self, stream: Stream) -> None:
        with self._changed:
            self._lent.discard(stream)
            if self._closed_because is None:
                self._idle.append(stream)
            else:
                stream.close()
            self._changed.notify()

    def _drop(self, stream: Stream) -> None:
        with self._changed:
            self._lent.discard(stream)
            stream.close()
            self._changed.notify()

    def _wait(self, deadline: Deadline) -> None:
        left_s = deadline.require("waiting for a stream to the peer")
        with self._recorder.waiting("stream") if self._recorder else nullcontext():
            self._changed.wait(left_s)

    def _require_open(self) -> None:
        if self._closed_because is not None:
            raise LLMException(self._closed_because, LLMStatusCode.LLM_NOT_YET_LINK)


def dial_stream(at: Endpoint, token: bytes, shields: Shields, deadline: Deadline) -> Stream:
    """A new stream of the link that the token names. Raises LLMException."""
    try:
        sock = socket.create_connection(at, deadline.require("opening a stream to the peer"))
    except TimeoutError:
        raise deadline.expired("opening a stream to the peer") from None
    except OSError as error:
        raise LLMException(
            f"no stream to {at} could be opened: {error}", LLMStatusCode.LLM_NOT_YET_LINK
        ) from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream = open_stream(sock, shields.make(is_caller=True))
    try:
        stream.greet(deadline)
        stream.ask(m.Attach(token, is_reverse=False), deadline)
    except BaseException:
        stream.close()
        raise
    return stream
