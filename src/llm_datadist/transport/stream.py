"""Streams: framed request connections, used by one thread at a time, every wait with a deadline."""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.core.link import status_of
from llm_datadist.core.segments import skip_bytes
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.transport import native

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.core.geometry import U64
    from llm_datadist.transport.deadline import Deadline

_TIMEVAL = struct.Struct("ll")


class Stream:
    """The asking end of a connection. A stream on which anything failed must be closed."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)  # the kernel keeps the deadlines (SO_RCVTIMEO, SO_SNDTIMEO)
        self._socket = sock

    def ask(self, message: m.Message, deadline: Deadline) -> m.AnyMessage:
        """The peer's answer. Raises LLMException with the peer's status when it refuses."""
        self._send(m.encode(message), deadline)
        answer = self.receive(deadline)
        if isinstance(answer, m.Refused):
            raise RequestRefused(answer.message, status_of(answer.status))
        return answer

    def receive(self, deadline: Deadline) -> m.AnyMessage:
        try:
            header = self._receive_exactly(m.HEADER.size, deadline)
            body = self._receive_exactly(m.body_nbytes(header, m.MAX_BODY_NBYTES), deadline)
            return m.decode(body)
        except m.ProtocolError as error:
            raise LLMException(
                f"the peer answered garbage: {error}", LLMStatusCode.LLM_FAILED
            ) from error

    def receive_into(self, vectors: U64, deadline: Deadline) -> None:
        """Fills memory by address, in order, using up `vectors`.

        An address that is not mapped is LLM_PARAM_INVALID.
        """
        while len(vectors):
            with _mapped_errors(self._socket, socket.SO_RCVTIMEO, deadline):
                got = native.recvmsg(self._socket.fileno(), vectors, native.MSG_WAITALL)
            if got == 0:
                raise _lost("it closed the connection")
            vectors = skip_bytes(vectors, got, native.IOV_MAX)

    def shutdown(self) -> None:
        """Ends whatever waits on the stream; safe from any thread."""
        with suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _send(self, frame: bytes, deadline: Deadline) -> None:
        view = memoryview(frame)
        while view:  # not `sendall`, which gives each of its calls the whole time
            with _mapped_errors(self._socket, socket.SO_SNDTIMEO, deadline):
                sent = self._socket.send(view)
            view = view[sent:]

    def _receive_exactly(self, nbytes: int, deadline: Deadline) -> bytearray:
        buffer = bytearray(nbytes)
        view = memoryview(buffer)
        while view:
            with _mapped_errors(self._socket, socket.SO_RCVTIMEO, deadline):
                got = self._socket.recv_into(view, 0, native.MSG_WAITALL)
            if got == 0:
                raise _lost("it closed the connection")
            view = view[got:]
        return buffer


class RequestRefused(LLMException):
    """The peer answered with a status; the stream is in order and may be used again."""


@contextmanager
def _mapped_errors(sock: socket.socket, option: int, deadline: Deadline) -> Iterator[None]:
    """Gives the kernel what is left of the deadline, and names what it reports."""
    left = deadline.require("the peer's answer")
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, _timeval(left))
        yield
    except BlockingIOError:
        raise deadline.expired("the peer's answer") from None
    except OSError as error:
        if error.errno == errno.EFAULT:
            raise LLMException(
                "a local address of the transfer is not mapped memory: "
                "was the tensor freed after it was registered?",
                LLMStatusCode.LLM_PARAM_INVALID,
            ) from error
        raise _lost(error.strerror or str(error)) from error


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return _TIMEVAL.pack(whole, max(1, int((seconds - whole) * 1e6)))


def _lost(reason: str) -> LLMException:
    return LLMException(f"the peer is gone: {reason}", LLMStatusCode.LLM_NOT_YET_LINK)
