"""Streams and answers whose bytes, or whose frames, go through their connection's shield.

With a shared secret frames are keyed, and what is in between passes as it is. Under TLS all bytes
are sealed. What is sealed cannot be sent from where it lies: each chunk is copied, sealed and sent.
The copies are the kernel's (`local.py`), so memory that is not mapped is an error here as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.core import messages as m
from llm_datadist.memory.local import Walk
from llm_datadist.transport.records import HEAD_NBYTES, OVERHEAD_NBYTES, RECORD_NBYTES, TAG_NBYTES
from llm_datadist.transport.secret import KEYED_HEAD_NBYTES, Secret
from llm_datadist.transport.shield import NotAuthentic
from llm_datadist.transport.stream import Stream, lost
from llm_datadist.transport.tcp import FrameSender, PatientSender
from llm_datadist.transport.tls import Tls

if TYPE_CHECKING:
    import socket

    from llm_datadist.core.segments import U64
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.transport.records import Buffer, Records
    from llm_datadist.transport.shield import Shield

_CHUNK_NBYTES = 256 * 1024


def open_stream(sock: socket.socket, shield: Shield) -> Stream:
    """The asking end of a connection, as its shield wants it behind the hand-shake."""
    if isinstance(shield, Secret):
        return KeyedStream(sock, shield)
    if isinstance(shield, Tls) and shield.seals_all:
        return SealedStream(sock, shield)
    return Stream(sock, shield)


def greeted(sock: socket.socket, shield: Shield, deadline: Deadline) -> Stream:
    """As above, of a connection that begins with the shield's hand-shake. Raises LLMException."""
    if not shield.is_done:
        Stream(sock, shield).greet(deadline)
    return open_stream(sock, shield)


def framed(message: m.Message, shield: Shield) -> bytes:
    """A message as it is sent on a connection, or by `sealed`."""
    frame = m.encode(message)
    return frame if shield.seals_all else shield.seal(frame)


def sealed(sender: FrameSender, sock: socket.socket, shield: Shield) -> FrameSender:
    """An answer, sealed if the connection's shield says so."""
    if isinstance(shield, Tls) and shield.seals_all:
        return SealedSender(sender, sock, shield)
    return sender


class KeyedStream(Stream):
    """A stream whose frames are keyed."""

    def __init__(self, sock: socket.socket, shield: Secret) -> None:
        super().__init__(sock, shield)
        self._secret = shield

    def receive(
        self,
        deadline: Deadline,
        max_nbytes: int = m.MAX_BODY_NBYTES,
        likely: m.AnyMessage | None = None,
    ) -> m.AnyMessage:
        self._secret.rest()
        foreseen = b"" if likely is None else self._secret.foreseen(m.encode(likely))
        keyed = bytearray(max(KEYED_HEAD_NBYTES, len(foreseen)))
        got = self._fill(keyed, deadline, KEYED_HEAD_NBYTES)
        if likely is not None and got == len(keyed) and self._secret.is_foreseen(keyed, foreseen):
            return likely
        try:
            end = KEYED_HEAD_NBYTES + self._secret.frame_nbytes(keyed, max_nbytes)
            self._complete(keyed, got, end, deadline)
            return m.decode_frame(self._secret.open_frame(memoryview(keyed)[:end]))
        except (NotAuthentic, m.ProtocolError) as error:
            raise lost(str(error)) from error

    def _send(self, frame: bytes, deadline: Deadline) -> None:
        super()._send(self._shield.seal(frame), deadline)


class SealedStream(Stream):
    """A stream under TLS: all bytes are sealed."""

    def __init__(self, sock: socket.socket, tls: Tls) -> None:
        super().__init__(sock, tls)
        self._tls = tls
        #: what was opened and is not taken yet
        self._plain = memoryview(b"")
        #: of the next record, if it has come
        self._head = b""
        #: for one record after the other, while bytes of caches come: as it came, and opened
        self._room: tuple[Buffer, Buffer] | None = None

    def receive_into(self, vectors: U64, nbytes: int, deadline: Deadline) -> None:
        self._room = _room(RECORD_NBYTES + OVERHEAD_NBYTES), _room(RECORD_NBYTES)
        walk, left = Walk(vectors), nbytes
        try:
            while left:
                data = np.frombuffer(self._some(left, deadline), dtype=np.uint8)
                moved = walk.scatter(data)
                self._pass(moved)
                left -= moved
        finally:
            self._room = None

    def _send(self, frame: bytes, deadline: Deadline) -> None:
        super()._send(self._tls.seal(frame), deadline)

    def _fill(
        self, buffer: bytearray | memoryview, deadline: Deadline, at_least: int | None = None
    ) -> int:
        view, missing = memoryview(buffer), at_least or len(buffer)
        while missing > 0:
            some = self._some(missing, deadline)  # behind that nothing may come
            view[: len(some)] = some
            view, missing = view[len(some) :], missing - len(some)
            self._pass(len(some))
        return len(buffer) - len(view)

    def _pass(self, nbytes: int) -> None:
        """So many of the next bytes are taken. Of a stream that waits no room is kept."""
        self._plain = self._plain[nbytes:] or memoryview(b"")

    def _some(self, max_nbytes: int, deadline: Deadline) -> memoryview:
        """The next bytes, which stay the next ones; one at least."""
        try:
            while not self._plain:
                if self._tls.records is None:
                    came = self._receive_some(_CHUNK_NBYTES, deadline)
                    self._plain = memoryview(self._tls.open(came))
                else:
                    self._plain = self._receive_record(self._tls.records, max_nbytes, deadline)
        except NotAuthentic as error:
            raise lost(str(error)) from error
        return self._plain[:max_nbytes]

    def _receive_record(
        self, records: Records, wanted_nbytes: int, deadline: Deadline
    ) -> memoryview:
        """What is in the next record. With it comes the head of another, if more is wanted."""
        head = bytearray(self._head or HEAD_NBYTES)
        if not self._head:
            super()._fill(head, deadline)
        nbytes = records.body_nbytes(head)
        head_nbytes = HEAD_NBYTES if nbytes - TAG_NBYTES < wanted_nbytes else 0
        sealed, plain = self._room or (_room(nbytes + head_nbytes), _room(nbytes))
        came = sealed.data[: nbytes + head_nbytes]
        super()._fill(came, deadline)
        self._head = bytes(came[nbytes:])
        return records.open_into(head, came[:nbytes], plain)


class SealedSender(PatientSender):
    """An answer under TLS, sealed chunk by chunk."""

    def __init__(self, sender: FrameSender, sock: socket.socket, tls: Tls) -> None:
        self._inner = sender
        self._socket = sock
        self._tls = tls
        #: room for a chunk, as it is and as a record
        self._plain = _room(min(sender.nbytes, RECORD_NBYTES))
        self._record = _room(len(self._plain) + OVERHEAD_NBYTES)
        #: what is left to send of a chunk
        self._sealed = memoryview(b"")
        self.nbytes = sender.nbytes

    def look(self) -> None:
        self._inner.look()

    def _send_some(self, flags: int) -> None:
        if not self._sealed:
            self._sealed = self._seal(self._inner.take(self._plain))
        sent = self._socket.send(self._sealed, flags)
        self._sealed = self._sealed[sent:]
        self.nbytes = self._inner.nbytes + len(self._sealed)

    def _seal(self, plain: Buffer) -> memoryview:
        if self._tls.records is None:
            return memoryview(self._tls.seal(plain.data))
        return self._tls.records.seal_into(plain, self._record)


def _room(nbytes: int) -> Buffer:
    return np.empty(nbytes, dtype=np.uint8)
