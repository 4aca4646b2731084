"""TCP: scatter/gather straight between sockets and the caches' memory, several streams a link.

The reader asks for addresses on a stream; the owner checks them and sends the bytes as they lie
(`sendmsg`), the reader receives them where they belong (`recvmsg`). Behind the data the owner says
under which generation it sent, so that memory which was recycled meanwhile is seen.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import struct
import threading
import time
import weakref
from array import array
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.core import messages as m
from llm_datadist.core.generations import STALE, WORD_NBYTES
from llm_datadist.core.packed import pack_vectors
from llm_datadist.core.segments import FEW, iovecs, skip_bytes
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.locks import is_owned
from llm_datadist.memory import native
from llm_datadist.memory.local import Walk
from llm_datadist.running.movers import MIN_PART_NBYTES
from llm_datadist.running.threads import is_ours
from llm_datadist.system_errors import refusals_ignored
from llm_datadist.transport.base import AllMemory, Channel, StaleCache, Streams
from llm_datadist.transport.stream import RequestRefused, timeval

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.remote import Guard
    from llm_datadist.core.segments import U64
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.running.movers import Call, Movers
    from llm_datadist.transport.stream import Stream

#: a peer that takes nothing of an answer for so long is waited for without a thread
_PATIENCE_S = 0.05
#: a little longer than one call of the system's for an answer takes
_BESIDE_S = 4 * _PATIENCE_S
#: a long answer gives its thread to others after so long, and goes on when it is its turn again
_SLICE_S = 0.1
#: how much the kernel takes beyond what the network does: what lies in a socket for long has left
#: the processor's cache by the time it is sent, which cost a fifth of the throughput here
_UNSENT_NBYTES = 32 * 1024
#: peers with shorter round trips are on the same network
_NEAR_US = 1000
#: where in TCP_INFO the shortest round trip is, in microseconds
_MIN_RTT = struct.Struct("148xI")

#: larger segments are cut, so that streams share them evenly: a quarter of the smallest part
_PIECE_NBYTES = MIN_PART_NBYTES // 4

_TRAILER_NBYTES = 2 * WORD_NBYTES
_FILLER = np.zeros(64 * 1024, dtype=np.uint8)


class TcpTransport(AllMemory):
    """Works wherever the control connection does: it dials the same port."""

    name = "tcp"
    asks_owner = True
    may_wait = True

    def __init__(self, movers: Movers) -> None:
        self._movers = movers

    def offer(self) -> bytes | None:
        return b""

    def open(self, offer: bytes, streams: Streams) -> Channel:
        return TcpChannel(streams, self._movers)

    def close(self) -> None:
        pass


class TcpChannel:
    """Reads one peer's memory through request streams, one for each thread that helps."""

    def __init__(self, streams: Streams, movers: Movers) -> None:
        self._streams = streams
        self._movers = movers

    def read(self, pieces: Pieces, guard: Guard, deadline: Deadline) -> None:
        count = self._movers.parts_of(pieces.total_nbytes)
        if count == 1 and len(pieces) <= FEW:
            self._read_part(pieces, guard, deadline)
            return
        parts = pieces.bounded(_PIECE_NBYTES).split(count)
        tasks = [partial(self._read_part, part, guard, deadline) for part in parts]
        self._movers.run(tasks, deadline.token)

    def close(self) -> None:
        pass

    def _read_part(
        self, part: Pieces, guard: Guard, deadline: Deadline, _: Call | None = None
    ) -> None:
        with self._streams.borrow(deadline) as stream:
            for window in part.windows(m.MAX_REQUEST_SEGMENTS):
                if len(window):
                    _read_window(stream, window, guard, deadline)


def _read_window(stream: Stream, window: Pieces, guard: Guard, deadline: Deadline) -> None:
    timeout_ms = max(1, int(deadline.require("the transfer") * 1000))
    claim = guard.claim and (*guard.claim.key, guard.claim.row)
    columns = pack_vectors(window.src_iovecs())
    read = m.Read(guard.cache_id, guard.generation, timeout_ms, columns, claim)
    stream.tell(read, deadline)
    # while the owner is at it
    trailer = array("Q", (0, 0))
    vectors = window.dst_iovecs(behind=[(trailer.buffer_info()[0], _TRAILER_NBYTES)])
    try:
        answer = stream.answer(deadline, likely=m.Sending(window.total_nbytes))
    except RequestRefused as refused:
        if refused.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
            raise StaleCache(guard) from refused
        raise
    if not isinstance(answer, m.Sending) or answer.nbytes != window.total_nbytes:
        raise LLMException(f"the peer answered {answer!r:.200}", LLMStatusCode.LLM_FAILED)
    stream.receive_into(vectors, answer.nbytes + _TRAILER_NBYTES, deadline)
    generation, bad_addr = trailer
    if bad_addr:
        raise RequestRefused(
            f"the remote address {bad_addr:#x} is not mapped memory: "
            "was the tensor freed after it was registered?",
            LLMStatusCode.LLM_PARAM_INVALID,
        )
    if generation != guard.generation:
        raise StaleCache(guard)


def unpace(sock: socket.socket) -> None:
    """Has TCP send to a near peer as soon as it may, where it would wait for a timer each time.

    BBR does, which serves long paths; between hosts of one network the timers took a third of the
    throughput here. Every other algorithm is left alone, and one that the route locks.
    """
    # a system may not tell, or let nobody choose
    with refusals_ignored(), suppress(struct.error):
        if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"bbr"):
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.size)
            if _MIN_RTT.unpack(info)[0] < _NEAR_US:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")


class Permit:
    """The right to read memory for an answer, until it is revoked. Thread-safe.

    Whoever sends gives it back as soon as nothing reads the memory any more: when the answer is
    sent, or at the next look. What is left of an answer then are zeros, and the word that it is
    stale; of one under a ticket that is over, nothing is left: the connection ends.
    """

    def __init__(self, give_back: Callable[[], object], wake: Callable[[], object]) -> None:
        """`wake` has whoever sends look at once, where it waits for the peer; in any thread."""
        self.give_back = give_back
        self._wake = wake
        self.is_revoked = False
        #: whoever sends under it, held weakly
        self.sender: weakref.ref[Sender] | None = None
        #: of the ticket that it is under, if any: its word, and what that must hold
        self.ticket: tuple[U64, int] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the push that it is for has ended."""
        return self.ticket is not None and int(self.ticket[0][0]) != self.ticket[1]

    def revoke(self, *, is_awaited: bool) -> None:
        """Takes the right back; `give_back` is called soon, from where the answer is sent.

        A finalizer in a thread of the library's that waits for it may keep that from its turn.
        There it is called here, unless this very thread is in the middle of sending.
        """
        self.is_revoked = True
        sender = None if self.sender is None else self.sender()
        if is_awaited and sender is not None and is_ours():
            sender.let_go_beside()
        self._wake()


class FrameSender:
    """An answer of the owner, sent in as many steps as the socket asks for."""

    def __init__(self, sock: socket.socket, frame: bytes) -> None:
        self._socket = sock
        self._frame = array("B", frame)  # kept for its memory
        self._vectors = np.array([self._frame.buffer_info()], dtype=np.uint64)
        self._window = native.IOV_MAX
        #: over the vectors, once bytes are taken
        self._walk: Walk | None = None
        #: what is left to send
        self.nbytes = len(self._frame)

    def look(self) -> None:
        """Lets go of memory that was taken back. Raises OSError to end the connection."""

    def advance(self, until: float = math.inf) -> bool:
        """Sends what the socket takes now; True when all is sent. Raises OSError.

        At a moment it ends, although the socket takes more.
        """
        try:
            while self.nbytes and time.monotonic() < until:
                self._send_some(native.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return not self.nbytes

    def take(self, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The next bytes, in the buffer, for somebody else to send."""
        if self._walk is None:
            self._walk = Walk(self._vectors)
        data = self._walk.gather(buffer)
        self.nbytes -= len(data)
        return data

    def _stand(self) -> None:
        """The vectors are those of what is left, also where bytes were taken."""
        if self._walk is not None:
            self._vectors, self._walk = self._walk.left(), None

    def finish(self, deadline: Deadline) -> bool:
        """Sends the rest, waiting for the socket; False when it takes nothing for a while.

        Or when it takes long, and others should have the thread. Raises OSError, or
        LLMException(LLM_TIMEOUT).
        """
        unpace(self._socket)
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        until = time.monotonic() + _SLICE_S
        while not self.advance(until):
            left_s = deadline.require("an answer to the peer")
            if time.monotonic() > until or not poller.poll(min(left_s, _PATIENCE_S) * 1000):
                return False
        return True

    def _send_some(self, flags: int) -> None:
        """One call of the system's. Raises OSError, BlockingIOError."""
        sent = native.sendmsg(self._socket.fileno(), self._vectors[: self._window], flags)
        self.nbytes -= sent
        if self.nbytes:
            self._vectors = skip_bytes(self._vectors, sent, native.IOV_MAX)


class PatientSender(FrameSender):
    """One that leaves it to the kernel to wait: that saves a call for each bit of room."""

    def finish(self, deadline: Deadline) -> bool:
        """As above."""
        os.set_blocking(self._socket.fileno(), True)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(_PATIENCE_S))
        if self._socket.family != socket.AF_UNIX:  # members of a rank table met on this host
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_NBYTES)
        unpace(self._socket)
        until = time.monotonic() + _SLICE_S
        try:
            while self.nbytes and time.monotonic() < until:
                deadline.require("an answer to the peer")
                self._send_some(0)
        except BlockingIOError:
            return False
        finally:
            os.set_blocking(self._socket.fileno(), False)
        return not self.nbytes


class Sender(PatientSender):
    """The answer to one read: a frame that says Sending, the bytes as they lie, the trailer.

    The trailer is the cache's generation word and the address of what could not be read. The kernel
    takes the vectors in order, so the word says what held when all bytes in front had been taken.
    """

    def __init__(
        self,
        sock: socket.socket,
        frame: bytes,
        addrs: U64,
        nbytes: U64,
        total_nbytes: int,
        word_addr: int,
        permit: Permit,
    ) -> None:
        super().__init__(sock, frame)
        self._permit: Permit | None = permit
        permit.sender = weakref.ref(self)
        #: of the thread that reads the memory, or changes what is left
        self._lock = threading.RLock()
        #: the push that it is for has ended
        self._is_ended = False
        self._total_nbytes = total_nbytes
        self._stale_word = array("Q", (STALE,))
        self._bad_addr = array("Q", (0,))
        trailer = [(word_addr, WORD_NBYTES), (self._bad_addr.buffer_info()[0], WORD_NBYTES)]
        self._vectors = iovecs(addrs, nbytes, [self._frame.buffer_info()], trailer)
        self.nbytes += total_nbytes + _TRAILER_NBYTES

    def look(self) -> None:
        """Lets go of the memory if the permit was revoked. Raises OSError to end the connection."""
        with self._lock:
            self._let_go()
        if self._is_ended:
            raise OSError(errno.ECANCELED, "the push that it is for has ended")

    def let_go_beside(self) -> None:
        """As `look`, in another thread than sends; if this one is it, its next look does."""
        if not is_owned(self._lock) and self._lock.acquire(timeout=_BESIDE_S):
            try:
                self._let_go()
            finally:
                self._lock.release()

    def _let_go(self) -> None:
        permit = self._permit
        if permit is None:
            return
        is_over = permit.is_over
        if not (is_over or permit.is_revoked):
            return
        self._permit = None
        self._is_ended = is_over
        if not is_over:
            self._withdraw()
        permit.give_back()

    def _send_some(self, flags: int) -> None:
        while True:
            with self._lock:
                self.look()
                try:
                    super()._send_some(flags)
                except OSError as error:
                    if error.errno != errno.EFAULT or self.nbytes <= _TRAILER_NBYTES:
                        raise
                    self._pass_fault()
                else:
                    return

    def take(self, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        with self._lock:
            self.look()
            data = super().take(buffer)
            if not len(data):
                self._window = 1
                self._pass_fault()
                data = super().take(buffer)
            return data

    def _pass_fault(self) -> None:
        """The memory is gone: keeps the stream in step with zeros, and says so in the trailer."""
        self._stand()
        if self._window > 1:  # one bad vector fails a call that has good ones in front of it
            self._window = 1
            return
        self._bad_addr[0] = int(self._vectors[0, 0])
        self._vectors = np.concatenate((_zeros(self.nbytes - _TRAILER_NBYTES), self._vectors[-2:]))

    def _withdraw(self) -> None:
        """The memory is taken back: zeros for what is left, and a word that is stale."""
        self._stand()
        left_of_frame = max(0, self.nbytes - (self._total_nbytes + _TRAILER_NBYTES))
        if self.nbytes > _TRAILER_NBYTES:
            frame = self._vectors[:1] if left_of_frame else self._vectors[:0]
            zeros = _zeros(self.nbytes - left_of_frame - _TRAILER_NBYTES)
            word = iovecs(
                np.array([self._stale_word.buffer_info()[0]], np.uint64),
                np.array([WORD_NBYTES], np.uint64),
            )
            self._vectors = np.concatenate((frame, zeros, word, self._vectors[-1:]))


def _zeros(nbytes: int) -> U64:
    """Vectors of so many zeros."""
    lengths = np.full(-(-nbytes // _FILLER.nbytes), _FILLER.nbytes, dtype=np.uint64)
    if nbytes:
        lengths[-1] = nbytes - (len(lengths) - 1) * _FILLER.nbytes
    return iovecs(np.full(len(lengths), _FILLER.ctypes.data, np.uint64), lengths)
