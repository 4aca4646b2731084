"""TCP: scatter/gather straight between sockets and the caches' memory, several streams a link.

The reader asks for addresses on a stream; the owner checks them and sends the bytes as they lie
(`sendmsg`), the reader receives them where they belong (`recvmsg`). Behind the data the owner says
under which generation it sent, so that memory which was recycled meanwhile is seen.
"""

from __future__ import annotations

import errno
import select
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.core import messages as m
from llm_datadist.core.segments import Segments, iovecs, skip_bytes
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.transport import native
from llm_datadist.transport.base import Channel, StaleCache, Streams
from llm_datadist.transport.stream import RequestRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.core.geometry import U64
    from llm_datadist.core.remote import Guard
    from llm_datadist.transport.deadline import Deadline
    from llm_datadist.transport.movers import Movers
    from llm_datadist.transport.stream import Stream

#: a peer that takes nothing of an answer for so long is waited for without a thread
_PATIENCE_S = 0.05

#: larger segments are cut, so that streams share them evenly
_PIECE_NBYTES = 8 * 1024 * 1024

_FILLER = np.zeros(64 * 1024, dtype=np.uint8)


class TcpTransport:
    """Works wherever the control connection does: it dials the same port."""

    name = "tcp"

    def __init__(self, movers: Movers, streams: int) -> None:
        self._movers = movers
        self._streams = streams

    def offer(self) -> bytes | None:
        return b""

    def open(self, offer: bytes, streams: Streams) -> Channel:
        return TcpChannel(streams, self._movers, self._streams)

    def close(self) -> None:
        pass


class TcpChannel:
    """Reads one peer's memory through request streams."""

    def __init__(self, streams: Streams, movers: Movers, max_streams: int) -> None:
        self._streams = streams
        self._movers = movers
        self._max_streams = max_streams

    def read(self, segments: Segments, guard: Guard, deadline: Deadline) -> None:
        parts = min(self._max_streams, self._movers.parts_of(segments.total_nbytes))
        pieces = segments.bounded(_PIECE_NBYTES).split(parts)
        self._movers.run([partial(self._read_part, part, guard, deadline) for part in pieces])

    def close(self) -> None:
        pass

    def _read_part(self, part: Segments, guard: Guard, deadline: Deadline) -> None:
        with self._streams.borrow(deadline) as stream:
            for start in range(0, len(part), m.MAX_REQUEST_SEGMENTS):
                piece = part.slice(start, start + m.MAX_REQUEST_SEGMENTS)
                _read_piece(stream, piece, guard, deadline)


def _read_piece(stream: Stream, piece: Segments, guard: Guard, deadline: Deadline) -> None:
    columns = m.pack_columns(piece.src, piece.nbytes)
    timeout_ms = max(1, int(deadline.require("the transfer") * 1000))
    try:
        answer = stream.ask(m.Read(guard.cache_id, guard.generation, timeout_ms, columns), deadline)
    except RequestRefused as refused:
        if refused.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
            raise StaleCache(guard) from refused
        raise
    if not isinstance(answer, m.Sending) or answer.nbytes != piece.total_nbytes:
        raise LLMException(f"the peer answered {answer!r:.200}", LLMStatusCode.LLM_FAILED)
    trailer = np.zeros(2, dtype="<u8")
    landing = np.array([[trailer.ctypes.data, trailer.nbytes]], dtype=np.uint64)
    stream.receive_into(np.concatenate((iovecs(piece.dst, piece.nbytes), landing)), deadline)
    generation, bad_addr = (int(word) for word in trailer)
    if bad_addr:
        raise RequestRefused(
            f"the remote address {bad_addr:#x} is not mapped memory: "
            "was the tensor freed after it was registered?",
            LLMStatusCode.LLM_PARAM_INVALID,
        )
    if generation != guard.generation:
        raise StaleCache(guard)


class FrameSender:
    """An answer of the owner, sent in as many steps as the socket asks for."""

    def __init__(self, fd: int, message: m.Message) -> None:
        self._fd = fd
        self._window = native.IOV_MAX
        self._frame = np.frombuffer(m.encode(message), dtype=np.uint8)  # kept for its memory
        self._vectors = np.array([[self._frame.ctypes.data, self._frame.nbytes]], dtype=np.uint64)

    @property
    def nbytes(self) -> int:
        """What is left to send."""
        return int(self._vectors[:, 1].sum())

    def advance(self) -> bool:
        """Sends what the socket takes now; True when all is sent. Raises OSError."""
        while len(self._vectors):
            try:
                window = self._vectors[: self._window]
                sent = native.sendmsg(self._fd, window, native.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            self._vectors = skip_bytes(self._vectors, sent, native.IOV_MAX)
        return True

    def finish(self, deadline: Deadline) -> bool:
        """Sends the rest, waiting for the socket; False when it takes nothing for a while.

        Raises OSError, or LLMException(LLM_TIMEOUT).
        """
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        while not self.advance():
            left_s = deadline.require("an answer to the peer")
            if not poller.poll(min(left_s, _PATIENCE_S) * 1000):
                return False
        return True


class Sender(FrameSender):
    """The answer to one read: a frame, the bytes as they lie in memory, the trailer."""

    def __init__(self, fd: int, addrs: U64, nbytes: U64, generation: Callable[[], int]) -> None:
        super().__init__(fd, m.Sending(int(nbytes.sum())))
        self._vectors = np.concatenate((self._vectors, iovecs(addrs, nbytes)))
        self._generation = generation
        self._bad_addr = 0
        self._trailer = np.zeros(2, dtype="<u8")
        self._is_trailing = False

    def advance(self) -> bool:
        while True:
            try:
                if not super().advance():
                    return False
            except OSError as error:
                if error.errno != errno.EFAULT or self._is_trailing:
                    raise
                self._pass_fault()
                continue
            if self._is_trailing:
                return True
            self._add_trailer()

    def _pass_fault(self) -> None:
        """The memory is gone: keeps the stream in step with zeros, and says so in the trailer."""
        if self._window > 1:  # one bad vector fails a call that has good ones in front of it
            self._window = 1
            return
        self._bad_addr = int(self._vectors[0, 0])
        missing = self.nbytes
        lengths = np.full(-(-missing // _FILLER.nbytes), _FILLER.nbytes, dtype=np.uint64)
        lengths[-1] = missing - (len(lengths) - 1) * _FILLER.nbytes
        self._vectors = iovecs(np.full(len(lengths), _FILLER.ctypes.data, np.uint64), lengths)

    def _add_trailer(self) -> None:
        self._trailer[:] = self._generation(), self._bad_addr
        self._vectors = np.array([[self._trailer.ctypes.data, 16]], dtype=np.uint64)
        self._is_trailing = True
