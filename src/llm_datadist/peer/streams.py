"""The request streams of one link: opened when needed, kept, and closed with the link.

Guaranteed: a stream is lent to one thread at a time; one that an exchange failed on, or that an
interrupted thread lost, is closed; with the link all are closed, and whoever waits for one is told
why. Any thread may borrow.

The end that was called cannot dial, so it asks its peer to, and the stream comes later by `add`.
Whoever waits may find that another thread took what came, even the stream that it asked the peer
for itself. So nobody waits for a stream of its own: as many are asked for as threads want one, and
whoever comes first takes what comes. A peer that did not dial within a time is asked again.
Rejected: a request by each thread (one whose stream another one took waited in vain).

A stream is claimed by one step (`_lent`). A claim is a Loan, which names the call that it is for:
it is lost when that call is over, wherever a signal's exception struck, and whatever the program
keeps of that (`running/deadline.py`). Whoever finds no free stream collects such claims, and closes
their streams; a socket is noted with its claim before it is one. `_lock` guards that nothing is
added to what is closed, and that a call which is cut ends no stream of another; nothing is waited
for under it.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.locks import make_lock
from llm_datadist.running.bell import Bell
from llm_datadist.system_errors import refusals_ignored
from llm_datadist.transport.base import StaleCache
from llm_datadist.transport.dialing import connect
from llm_datadist.transport.same_host import Process
from llm_datadist.transport.sealed import greeted
from llm_datadist.transport.stream import RequestRefused, Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.core import messages as m
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.running.deadline import Deadline, Token
    from llm_datadist.transport.same_host import Address
    from llm_datadist.transport.shield import Shield

#: more threads than this on one link wait for each other's streams
MAX_STREAMS = 32
#: a peer that was asked for a stream, and has not dialled by then, is asked again
_ASK_AGAIN_S = 5.0


class Loan:
    """A stream that is lent, to be given back by `with`; or the wish for one."""

    __slots__ = ("_pool", "bell", "opened", "stream", "token")

    def __init__(self, pool: StreamPool, token: Token | None) -> None:
        self._pool = pool
        #: whose it is; None: of a thread that nothing interrupts, and which gives it back
        self.token = token
        self.stream: Stream | None = None
        #: by which its thread waits, where it has to
        self.bell: Bell
        #: the sockets of a stream that it dials
        self.opened: list[socket.socket] = []

    @property
    def is_lost(self) -> bool:
        return self.token is not None and self.token.is_over

    @property
    def is_cut(self) -> bool:
        return self.token is not None and self.token.is_cut

    def cut(self) -> None:
        """Whoever waits for it, or on it, does not any more."""
        self._pool.cut(self)

    def __enter__(self) -> Stream:
        assert self.stream is not None
        return self.stream

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # a complete exchange may have a bad outcome
        is_good = error is None or isinstance(error, RequestRefused | StaleCache)
        self._pool.end_loan(self, is_good=is_good)


class StreamPool:
    """Lends streams, one thread each. Thread-safe.

    A caller's pool dials (`dial`); that of the end that was called asks its peer to (`ask`), and
    gets what comes by `add`.
    """

    def __init__(
        self,
        dial: Callable[[Deadline, list[socket.socket]], Stream] | None,
        ask: Callable[[], object],
        recorder: Recorder | None = None,
        process: Process | None = None,
    ) -> None:
        self.process = process
        self._dial = dial
        self._ask = ask
        self._recorder = recorder
        self._lock = make_lock()
        #: all that are open
        self._streams: dict[Stream, None] = {}
        #: those of them that are lent, and to whom
        self._lent: dict[Stream, Loan] = {}
        #: loans of threads that have no stream yet, in the order in which they came
        self._wanting: dict[Loan, None] = {}
        #: those of them that are dialling
        self._dialing: dict[Loan, None] = {}
        #: when the peer was asked for those that have not come
        self._asked: deque[float] = deque()
        self._closed_because: str | None = None

    def borrow(self, deadline: Deadline) -> Loan:
        """A stream for one exchange. One that an exchange fails on is closed, not given back.

        Raises LLMException: LLM_TIMEOUT, LLM_NOT_YET_LINK.
        """
        token = deadline.token
        loan = Loan(self, token)
        if token is not None:
            token.waits[loan] = None
        if self._wanting or not self._claims(loan):  # those that wait come first
            self._wait(loan, deadline)
        if self._closed_because is not None or (token is not None and token.is_cut):
            self.cut(loan)
        return loan

    def end_loan(self, loan: Loan, *, is_good: bool) -> None:
        """The exchange is over."""
        stream = loan.stream
        assert stream is not None
        with self._lock:  # nobody cuts it behind this look
            is_done_with = stream.is_shut or stream.is_worn
            if not is_good or is_done_with or self._closed_because is not None:
                self._drop(stream)
            self._lent.pop(stream, None)
        if loan.token is not None:
            loan.token.waits.pop(loan, None)
        if self._wanting:
            self._ring_next()

    def cut(self, loan: Loan) -> None:
        """Ends what the loan has, or waits for. In any thread."""
        with self._lock:
            stream = loan.stream
            if stream is not None and self._lent.get(stream) is loan:
                stream.shutdown()
            for sock in list(loan.opened):
                if not self._has(sock):
                    with refusals_ignored():  # it is not connected yet, or closed already
                        sock.shutdown(socket.SHUT_RDWR)
        self._ring()

    def add(self, stream: Stream) -> None:
        """A stream that the peer dialled for us."""
        if self._asked:
            self._asked.popleft()
        self._keep(stream)
        self._ring()

    def is_full(self, most: int = MAX_STREAMS) -> bool:
        """Whether there are as many as there may be, or more."""
        return len(self._streams) >= most

    @property
    def is_closed(self) -> bool:
        return self._closed_because is not None

    def close(self, because: str) -> None:
        """Ends all streams; whoever waits on one gets LLM_NOT_YET_LINK."""
        with self._lock:
            self._closed_because = because
            streams = list(self._streams)
        closing = Loan(self, None)  # so that nobody claims what is being closed
        for stream in streams:
            if self._lent.setdefault(stream, closing) is closing:
                self._drop(stream)
                self._lent.pop(stream, None)
            else:
                stream.shutdown()  # its thread notices, and closes it
        self._collect_lost()
        self._ring()

    def _claims(self, loan: Loan) -> bool:
        """Whether there was a free stream, which is the loan's from here on."""
        for stream in list(self._streams):
            if stream not in self._lent and self._lent.setdefault(stream, loan) is loan:
                if stream in self._streams:
                    loan.stream = stream
                    return True
                del self._lent[stream]  # dropped since
        return False

    def _wait(self, loan: Loan, deadline: Deadline) -> None:
        """Until the loan has a stream. Whoever waits opens what is missing, for all that wait."""
        loan.bell = Bell()
        try:
            self._wanting[loan] = None
            while not (self._is_next(loan) and self._claims(loan)):
                if self._closed_because is not None:
                    raise LLMException(self._closed_because, LLMStatusCode.LLM_NOT_YET_LINK)
                if loan.token is not None:
                    loan.token.require()
                if self._is_one_missing():
                    if self._dial is not None:
                        self._open_one(loan, self._dial, deadline)
                        continue
                    self._asked.append(time.monotonic())
                    self._ask()
                left_s = deadline.require("waiting for a stream to the peer")
                with self._recorder.waiting("stream") if self._recorder else nullcontext():
                    loan.bell.wait_until(
                        partial(self._is_worth_a_look, loan), min(left_s, _ASK_AGAIN_S)
                    )
        finally:
            self._wanting.pop(loan, None)
            self._ring()

    def _open_one(
        self,
        loan: Loan,
        dial: Callable[[Deadline, list[socket.socket]], Stream],
        deadline: Deadline,
    ) -> None:
        """One more stream, for whoever is next. Raises LLMException."""
        self._dialing[loan] = None
        try:
            self._keep(dial(deadline, loan.opened), loan)
        finally:
            self._end_dialing(loan)
            self._ring()

    def _end_dialing(self, loan: Loan) -> None:
        """Closes what came to nothing. May be called again."""
        for sock in loan.opened:
            if not self._has(sock):
                socket.SocketType.close(sock)  # it may be half made
        self._dialing.pop(loan, None)

    def _has(self, sock: socket.socket) -> bool:
        return any(stream.is_on(sock) for stream in list(self._streams))

    def _is_next(self, loan: Loan) -> bool:
        """Whether no more threads came before it than there are free streams."""
        self._collect_lost()
        return loan in list(self._wanting)[: max(1, self._num_free())]

    def _is_worth_a_look(self, loan: Loan) -> bool:
        if self._closed_because is not None or loan.is_cut:
            return True
        if self._is_next(loan) and self._num_free() > 0:
            return True
        return self._is_one_missing()

    def _num_free(self) -> int:
        return sum(stream not in self._lent for stream in list(self._streams))

    def _is_one_missing(self) -> bool:
        """Whether more threads want a stream than there will be, and one more may be opened."""
        while self._asked and self._asked[0] < time.monotonic() - _ASK_AGAIN_S:
            self._asked.popleft()
        coming = len(self._dialing) + len(self._asked)
        if len(self._streams) + coming >= MAX_STREAMS:
            return False
        return self._num_free() + coming < len(self._wanting)

    def _ring(self) -> None:
        """Something is to be looked at by whoever waits."""
        for loan in list(self._wanting):
            loan.bell.ring()

    def _ring_next(self) -> None:
        """A stream is free: those who are to take one look, and not all who wait."""
        self._collect_lost()
        for loan in list(self._wanting)[: max(1, self._num_free())]:
            loan.bell.ring()

    def _collect_lost(self) -> None:
        """Takes out what interrupted threads have left: claims, with their streams, and wishes."""
        for loan in list(self._wanting):
            if loan.is_lost:
                self._wanting.pop(loan, None)
        for loan in list(self._dialing):
            if loan.is_lost:
                self._end_dialing(loan)
        for stream in list(self._lent):  # not of pairs: to make those lets others in
            lent_to = self._lent.get(stream)
            if lent_to is not None and lent_to.is_lost:
                self._drop(stream)
                self._lent.pop(stream, None)

    def _keep(self, stream: Stream, dialled_by: Loan | None = None) -> None:
        with self._lock:
            is_cut = dialled_by is not None and dialled_by.is_cut
            if self._closed_because is None and not is_cut:
                self._streams[stream] = None
                return
        stream.close()

    def _drop(self, stream: Stream) -> None:
        self._streams.pop(stream, None)
        stream.close()


def dial_stream(
    at: Address,
    process: Process | None,
    shield: Shield,
    attach: Callable[[Shield], m.Attach],
    deadline: Deadline,
    opened: list[socket.socket],
) -> Stream:
    """A new stream of a link, to the process of that link. Raises LLMException.

    Its sockets are in `opened` before they are open: of one dialler that a signal may strike.
    """
    sock = connect(at, deadline, LLMStatusCode.LLM_NOT_YET_LINK, opened)
    if process is not None and Process.of(sock) != process:
        sock.close()
        raise LLMException(f"{at} is another process's by now", LLMStatusCode.LLM_NOT_YET_LINK)
    try:
        stream = greeted(sock, shield, deadline)
        stream.ask(attach(shield), deadline)
    except BaseException:
        sock.close()
        raise
    return stream
