"""The request streams of one link: opened when needed, kept, and closed with the link."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.transport.base import StaleCache
from llm_datadist.transport.stream import RequestRefused, Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.transport.deadline import Deadline

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
