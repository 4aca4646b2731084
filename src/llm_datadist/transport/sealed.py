"""Streams and answers whose bytes, or whose frames, go through their connection's shield.

With a shared secret frames are keyed, and what is in between passes as it is. Under TLS all bytes
are sealed. What is sealed cannot be sent from where it lies: each chunk is copied, sealed and sent.
The copies are the kernel's (`local.py`), so memory that is not mapped is an error here as well.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.core import messages as m
from llm_datadist.core.segments import skip_bytes
from llm_datadist.memory import native
from llm_datadist.memory.local import scatter
from llm_datadist.transport.secret import KEYED_HEAD_NBYTES, Secret
from llm_datadist.transport.shield import NotAuthentic
from llm_datadist.transport.stream import Stream, lost
from llm_datadist.transport.tcp import FrameSender

if TYPE_CHECKING:
    import socket

    from llm_datadist.core.segments import U64
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.transport.shield import Shield

_CHUNK_NBYTES = 256 * 1024


def open_stream(sock: socket.socket, shield: Shield) -> Stream:
    """The asking end of a connection, as its shield wants it."""
    if isinstance(shield, Secret):
        return KeyedStream(sock, shield)
    return SealedStream(sock, shield) if shield.seals_all else Stream(sock, shield)


def framed(message: m.Message, shield: Shield) -> bytes:
    """A message as it is sent on a connection, or by `sealed`."""
    frame = m.encode(message)
    return frame if shield.seals_all else shield.seal(frame)


def sealed(sender: FrameSender, sock: socket.socket, shield: Shield) -> FrameSender:
    """An answer, sealed if the connection's shield says so."""
    return SealedSender(sender, sock, shield) if shield.seals_all else sender


class KeyedStream(Stream):
    """A stream whose frames are keyed."""

    def __init__(self, sock: socket.socket, shield: Secret) -> None:
        super().__init__(sock, shield)
        self._secret = shield

    def receive(self, deadline: Deadline, max_nbytes: int = m.MAX_BODY_NBYTES) -> m.AnyMessage:
        try:
            head = self._receive_exactly(KEYED_HEAD_NBYTES, deadline)
            frame = self._receive_exactly(self._secret.frame_nbytes(head, max_nbytes), deadline)
            return m.decode_frame(self._secret.open_frame(head, frame))
        except (NotAuthentic, m.ProtocolError) as error:
            raise lost(str(error)) from error

    def _send(self, frame: bytes, deadline: Deadline) -> None:
        super()._send(self._shield.seal(frame), deadline)


class SealedStream(Stream):
    """A stream whose shield seals all bytes."""

    def __init__(self, sock: socket.socket, shield: Shield) -> None:
        super().__init__(sock, shield)
        self._plain = bytearray()

    def receive_into(self, vectors: U64, nbytes: int, deadline: Deadline) -> None:
        left = nbytes
        while left:
            if not self._plain:
                self._receive_more(deadline)
            data = np.frombuffer(self._plain[:left], dtype=np.uint8)
            moved = scatter(data, vectors)
            vectors = skip_bytes(vectors, moved, native.IOV_MAX)
            del self._plain[:moved]
            left -= moved

    def _send(self, frame: bytes, deadline: Deadline) -> None:
        super()._send(self._shield.seal(frame), deadline)

    def _receive_exactly(self, nbytes: int, deadline: Deadline) -> bytearray:
        while len(self._plain) < nbytes:
            self._receive_more(deadline)
        taken = self._plain[:nbytes]
        del self._plain[:nbytes]
        return taken

    def _receive_more(self, deadline: Deadline) -> None:
        try:
            self._plain += self._shield.open(self._receive_some(_CHUNK_NBYTES, deadline))
        except NotAuthentic as error:
            raise lost(str(error)) from error


class SealedSender(FrameSender):
    """An answer, sealed chunk by chunk."""

    def __init__(self, sender: FrameSender, sock: socket.socket, shield: Shield) -> None:
        self._inner = sender
        self._socket = sock
        self._shield = shield
        self._plain = np.empty(_CHUNK_NBYTES, dtype=np.uint8)
        self._sealed = memoryview(b"")
        self.nbytes = sender.nbytes

    def look(self) -> None:
        self._inner.look()

    def advance(self, until: float = math.inf) -> bool:
        while time.monotonic() < until:
            while self._sealed:
                try:
                    sent = self._socket.send(self._sealed, native.MSG_DONTWAIT)
                except BlockingIOError:
                    return False
                self._sealed = self._sealed[sent:]
            if not self._inner.nbytes:
                return True
            self._sealed = memoryview(self._shield.seal(self._inner.take(self._plain).data))
        return False
