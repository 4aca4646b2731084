"""Streams: framed request connections, used by one thread at a time, every wait with a deadline."""

from __future__ import annotations

import errno
import select
import socket
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.core.link import status_of
from llm_datadist.core.segments import skip_bytes
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.memory import native
from llm_datadist.system_errors import pass_on_handlers, refusals_ignored
from llm_datadist.transport import ktls
from llm_datadist.transport.beginnings import Kind, why_to_leave
from llm_datadist.transport.shield import NotAuthentic

if TYPE_CHECKING:
    from llm_datadist.core.segments import U64
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.transport.shield import Shield

_CHUNK_NBYTES = 64 * 1024
_TIMEVAL = struct.Struct("ll")


class Stream:
    """The asking end of a connection. A stream on which anything failed must be closed."""

    def __init__(self, sock: socket.socket, shield: Shield) -> None:
        sock.setblocking(True)  # the kernel keeps the deadlines (SO_RCVTIMEO, SO_SNDTIMEO)
        self._socket = sock
        self._shield = shield
        #: somebody ended it, maybe behind an exchange that was complete
        self.is_shut = False
        self._carried_nbytes = 0
        #: with which one call fetches something, and all that it asks for; where the kernel opens
        #: none waits, for it would give each record the whole time that a call has
        self._some_flag, self._all_flag = 0, native.MSG_WAITALL
        if shield.kernels is not None:
            self._some_flag = self._all_flag = native.MSG_DONTWAIT
        #: the seconds after which the kernel gives up, by socket option
        self._limits_s = {socket.SO_RCVTIMEO: 0.0, socket.SO_SNDTIMEO: 0.0}

    def greet(self, deadline: Deadline) -> None:
        """The shield's hand-shake; what is behind it is for another stream. Raises LLMException."""
        Stream._send(self, self._shield.start(), deadline)
        try:
            while not self._shield.is_done:
                answer = self._shield.answer(self._receive_some(_CHUNK_NBYTES, deadline))
                Stream._send(self, answer, deadline)
            if (keys := self._shield.kernels) is not None:
                ktls.hand_over(self._socket, keys)
        except NotAuthentic as error:
            with suppress(LLMException):  # it has left already
                Stream._send(self, error.parting, deadline)
            raise _unwelcome(str(error)) from error
        except OSError as error:
            pass_on_handlers(error)
            raise lost(ktls.why_not_taken(error)) from error

    def ask(
        self, message: m.Message, deadline: Deadline, max_nbytes: int = m.MAX_BODY_NBYTES
    ) -> m.AnyMessage:
        """The peer's answer. Raises LLMException with the peer's status when it refuses.

        One whose body has more than `max_nbytes` is none.
        """
        self.tell(message, deadline)
        return self.answer(deadline, max_nbytes)

    def tell(self, message: m.Message, deadline: Deadline) -> None:
        """Sends a question whose `answer` is asked for later. Raises LLMException."""
        self._send(m.encode(message), deadline)

    def answer(
        self,
        deadline: Deadline,
        max_nbytes: int = m.MAX_BODY_NBYTES,
        likely: m.AnyMessage | None = None,
    ) -> m.AnyMessage:
        """The answer to what was told. Raises as `ask` does."""
        answer = self.receive(deadline, max_nbytes, likely)
        if isinstance(answer, m.Refused):
            raise RequestRefused(answer.message, status_of(answer.status))
        return answer

    def receive(
        self,
        deadline: Deadline,
        max_nbytes: int = m.MAX_BODY_NBYTES,
        likely: m.AnyMessage | None = None,
    ) -> m.AnyMessage:
        """The next frame, which comes sooner if it is what is likely. Raises LLMException."""
        foreseen = b"" if likely is None else m.encode(likely)
        frame = bytearray(max(m.HEADER.size, len(foreseen)))
        got = self._fill(frame, deadline, m.HEADER.size)
        if likely is not None and got == len(frame) and frame == foreseen:
            return likely
        try:
            end = m.HEADER.size + m.body_nbytes(frame[: m.HEADER.size], max_nbytes)
            self._complete(frame, got, end, deadline)
            return m.decode(memoryview(frame)[m.HEADER.size : end])
        except m.ProtocolError as error:
            if reason := why_to_leave(frame[: m.HEADER.size], Kind.OPEN):
                raise _unwelcome(reason) from error
            raise LLMException(
                f"the peer answered garbage: {error}", LLMStatusCode.LLM_FAILED
            ) from error

    def receive_into(self, vectors: U64, nbytes: int, deadline: Deadline) -> None:
        """Fills memory by address, in order, using up `vectors`, which hold `nbytes`.

        An address that is not mapped is LLM_PARAM_INVALID.
        """
        wanted, pause_s = nbytes, 0.0
        while wanted:
            self._limit(socket.SO_RCVTIMEO, deadline)
            try:
                got = native.recvmsg(self._socket.fileno(), vectors, self._all_flag)
            except BlockingIOError as error:
                pass_on_handlers(error)
                pause_s = self._pause(pause_s, deadline)
                continue  # `_limit` knows whether that was the deadline
            except OSError as error:
                raise _explain(error, self._shield) from error
            if got == 0:
                raise lost("it closed the connection")
            self._carried_nbytes += got
            wanted, pause_s = wanted - got, 0.0
            if wanted:
                vectors = skip_bytes(vectors, got, native.IOV_MAX)

    def shutdown(self) -> None:
        """Ends whatever waits on the stream, which cannot be used again; in any thread."""
        self.is_shut = True
        with refusals_ignored():  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    @property
    def is_worn(self) -> bool:
        """It has carried as much as its shield is good for: it is not to be used again."""
        return self._carried_nbytes > self._shield.most_nbytes

    def is_on(self, sock: socket.socket) -> bool:
        return self._socket is sock

    def close(self) -> None:
        self._socket.close()

    def _send(self, frame: bytes, deadline: Deadline) -> None:
        view = memoryview(frame)
        while view:  # not `sendall`, which gives each of its calls the whole time
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                sent = self._socket.send(view)
            except BlockingIOError as error:
                pass_on_handlers(error)
                continue  # `_limit` knows whether that was the deadline
            except OSError as error:
                raise _explain(error, self._shield) from error
            self._carried_nbytes += sent
            view = view[sent:]

    def _complete(self, frame: bytearray, got: int, end: int, deadline: Deadline) -> None:
        """Fills it up to where it ends. Raises ProtocolError when more came already."""
        if got > end:
            raise m.ProtocolError(f"{got - end} bytes behind an answer")
        if got < end:
            frame.extend(bytes(max(0, end - len(frame))))
            self._fill(memoryview(frame)[got:end], deadline)

    def _fill(
        self, buffer: bytearray | memoryview, deadline: Deadline, at_least: int | None = None
    ) -> int:
        """With the next bytes: all of it, or what there is beyond the least; how many they are."""
        view, flags = memoryview(buffer), self._some_flag if at_least else self._all_flag
        missing, pause_s = at_least or len(view), 0.0
        while missing > 0:
            self._limit(socket.SO_RCVTIMEO, deadline)
            try:
                got = self._socket.recv_into(view, 0, flags)
            except BlockingIOError as error:
                pass_on_handlers(error)
                pause_s = self._pause(pause_s, deadline)
                continue  # `_limit` knows whether that was the deadline
            except OSError as error:
                raise _explain(error, self._shield) from error
            if got == 0:
                raise lost("it closed the connection")
            self._carried_nbytes += got
            view, missing, pause_s = view[got:], missing - got, 0.0
        return len(buffer) - len(view)

    def _pause(self, pause_s: float, deadline: Deadline) -> float:
        """Nothing has come: waits for it, where the call itself has not; how long the next time.

        What made it stop waiting may have been a part of a record, or nothing but one's head.
        """
        if self._shield.kernels is None:
            return 0.0
        left_s = max(0.0, deadline.remaining_s())
        if pause_s:
            time.sleep(min(pause_s, left_s))
        else:
            poller = select.poll()
            poller.register(self._socket, select.POLLIN)
            poller.poll(left_s * 1000)
        return ktls.longer_s(pause_s)

    def _receive_some(self, max_nbytes: int, deadline: Deadline) -> bytes:
        while True:
            self._limit(socket.SO_RCVTIMEO, deadline)
            try:
                data = self._socket.recv(max_nbytes)
            except BlockingIOError as error:
                pass_on_handlers(error)
                continue
            except OSError as error:
                raise _explain(error, self._shield) from error
            if not data:
                raise lost("it closed the connection")
            return data

    def _limit(self, option: int, deadline: Deadline) -> None:
        """Has the kernel give up about when the deadline passes. Raises LLMException(LLM_TIMEOUT).

        Most calls find the limit of the one before good enough, and save telling the kernel; one
        that gives up too early is made again.
        """
        left_s = deadline.require("the peer's answer")
        if not 0.95 * left_s <= self._limits_s[option] <= 1.02 * left_s:
            self._limits_s[option] = left_s
            self._socket.setsockopt(socket.SOL_SOCKET, option, timeval(left_s))


class RequestRefused(LLMException):
    """The peer answered with a status; the stream is in order and may be used again."""


def _explain(error: OSError, shield: Shield) -> LLMException:
    pass_on_handlers(error)
    if error.errno == errno.EFAULT:
        return LLMException(
            "a local address of the transfer is not mapped memory: "
            "was the tensor freed after it was registered?",
            LLMStatusCode.LLM_PARAM_INVALID,
        )
    return lost(ktls.why_broken(shield, error) or error.strerror or str(error))


def timeval(seconds: float) -> bytes:
    """What SO_RCVTIMEO and SO_SNDTIMEO take."""
    whole = int(seconds)
    return _TIMEVAL.pack(whole, max(1, int((seconds - whole) * 1e6)))


def _unwelcome(reason: str) -> LLMException:
    return LLMException(f"link security: {reason}", LLMStatusCode.LLM_NOT_YET_LINK)


def lost(reason: str) -> LLMException:
    """That the peer is gone."""
    return LLMException(f"the peer is gone: {reason}", LLMStatusCode.LLM_NOT_YET_LINK)
