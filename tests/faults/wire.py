"""Peers made by hand: the protocol spoken frame by frame, so that a test can break it anywhere."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, NoReturn, TypeVar

import msgspec
import numpy as np

from llm_datadist.core import messages as m
from llm_datadist.transport.base import PROBE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Self

M = TypeVar("M", bound=m.Message)
W = TypeVar("W", bound="Wire")

TRAILER = struct.Struct("<QQ")
NONCE = bytes(range(16))
#: an end of the hand-shake that lies nowhere: only a peer made by hand answers reads of it
PROBE = m.ProbeTarget(0x1000, NONCE, 0x2000, 77)
#: no answer of an engine takes this long
PATIENCE_S = 10.0


class Wire:
    """One connection, with messages on it. A context manager."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE_S)
        self.socket = sock

    @classmethod
    def dial(cls, port: int, own_host: str = "127.0.0.1") -> Wire:
        return cls(socket.create_connection(("127.0.0.1", port), PATIENCE_S, (own_host, 0)))

    @classmethod
    def begin_to_dial(cls, port: int) -> Wire:
        """Sends the first packet of a connection, which may never come about."""
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", port))
        return cls(sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def send(self, message: m.Message) -> None:
        """Whatever is in it: a peer need not keep to the bounds of fields."""
        self.socket.sendall(frame_of(message))

    def send_bytes(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> m.AnyMessage:
        """Raises EOFError when the other end closed the connection instead."""
        header = self.receive_bytes(m.HEADER.size)
        return m.decode(self.receive_bytes(m.body_nbytes(header, m.MAX_BODY_NBYTES)))

    def expect(self, kind: type[M]) -> M:
        message = self.receive()
        assert isinstance(message, kind), message
        return message

    def receive_bytes(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            try:
                part = self.socket.recv(nbytes - len(data))
            except ConnectionResetError:
                part = b""
            if not part:
                raise EOFError("the other end closed the connection")
            data += part
        return data

    def is_ended(self) -> bool:
        """Waits for the other end to close the connection; whatever else it says is passed over."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True

    def hang_up(self, *said: bytes, hard: bool = False) -> NoReturn:
        """Says this and closes the connection, or resets it; ends whoever treats it by EOFError."""
        for data in said:
            self.send_bytes(data)
        if hard:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
        raise EOFError("this end closed the connection")

    def proof(self, control: Wire) -> bytes:
        """What shows on this connection that its caller is the end of that link."""
        return b""

    def serve_probe(self) -> None:
        """Answers the read that verifies the path."""
        read = self.expect(m.Read)
        assert (read.cache_id, read.generation) == (0, PROBE.generation)
        self.send(m.Sending(PROBE_NBYTES))
        self.send_bytes(NONCE.ljust(PROBE_NBYTES) + TRAILER.pack(PROBE.generation, 0))


def frame_of(message: m.Message) -> bytes:
    """A frame that need not be decodable, which ours always are."""
    body = msgspec.msgpack.encode(message)
    return m.HEADER.pack(m.MAGIC, len(body)) + body


def hello(
    *,
    cluster_id: int = 4242,
    instance: bytes = b"made by hand, 16",
    is_remote_accessible: bool = False,
    version: int = m.PROTOCOL_VERSION,
    timeout_ms: int = 10_000,
    nonce: bytes = NONCE,
    probe: m.ProbeTarget = PROBE,
) -> m.Hello:
    offers = {"tcp": b""}
    return m.Hello(
        version,
        cluster_id,
        instance,
        is_remote_accessible,
        True,
        timeout_ms,
        offers,
        probe,
        nonce=nonce,
    )


class LinkedCaller:
    """A caller made by hand that an engine has linked to, over tcp. See `linked_caller`."""

    def __init__(
        self,
        dial: Callable[[], Wire],
        stack: ExitStack,
        *,
        is_remote_accessible: bool,
        unmet: str,
        cluster_id: int,
    ) -> None:
        self._dial = dial
        self._stack = stack
        self.control = stack.enter_context(dial())
        self.hello = hello(is_remote_accessible=is_remote_accessible, cluster_id=cluster_id)
        self.control.send(self.hello)
        self.welcome = self.control.expect(m.Welcome)
        self.control.send(m.Ready("tcp", unmet))
        self.control.expect(m.DialBack)
        #: on which the engine asks
        self.reverse = self.attach(is_reverse=True)
        self.reverse.serve_probe()
        self.control.expect(m.Linked)

    def dial(self) -> Wire:
        """A further connection, which lasts as long as the link."""
        return self._stack.enter_context(self._dial())

    def attach(self, *, is_reverse: bool = False) -> Wire:
        """A stream that has joined the link; unless `is_reverse`, the engine answers on it."""
        wire = self.dial()
        wire.send(m.Attach(self.welcome.token, is_reverse, wire.proof(self.control)))
        wire.expect(m.Attached)
        return wire


@contextmanager
def linked_caller(
    port: int,
    *,
    is_remote_accessible: bool = False,
    unmet: str = "",
    cluster_id: int = 4242,
    dial: Callable[[int], Wire] = Wire.dial,
) -> Iterator[LinkedCaller]:
    """Links by hand; closes all that was opened."""
    with ExitStack() as stack:
        yield LinkedCaller(
            partial(dial, port),
            stack,
            is_remote_accessible=is_remote_accessible,
            unmet=unmet,
            cluster_id=cluster_id,
        )


@contextmanager
def impostor(serve: Callable[[Wire], None]) -> Iterator[int]:
    """A port where `serve` treats each connection in a thread of its own; its failures are ours."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    threads: list[threading.Thread] = []
    wires: list[Wire] = []
    failures: list[Exception] = []

    def treat(wire: Wire) -> None:
        try:
            with suppress(EOFError, ConnectionError):  # the engine has had enough
                serve(wire)
        except Exception as error:  # raised again below, in the test's thread
            failures.append(error)

    def accept() -> None:
        with suppress(OSError):  # it was shut down
            while True:
                wires.append(Wire(listening.accept()[0]))
                threads.append(threading.Thread(target=treat, args=(wires[-1],)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        accepting.join()
        listening.close()
        for wire in wires:
            with suppress(OSError):  # it has ended already
                wire.socket.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for wire in wires:
            wire.socket.close()
    if failures:
        raise failures[0]


def owner(
    answer: Callable[[Wire, m.AnyMessage], None], instance: bytes = b"an owner by hand"
) -> Callable[[Wire], None]:
    """For `impostor`: an owner of cluster id 1 that links honestly, over tcp.

    It then answers every request of the caller by `answer`.
    """

    def serve(wire: Wire) -> None:
        first = wire.receive()
        if isinstance(first, m.Hello):
            wire.send(m.Welcome(m.PROTOCOL_VERSION, 1, instance, NONCE, {"tcp": b""}, PROBE))
            wire.expect(m.Ready)
            wire.send(m.Linked("tcp"))
            wire.is_ended()
        else:
            assert isinstance(first, m.Attach), first
            wire.send(m.Attached())
            while True:
                request = wire.receive()
                if isinstance(request, m.Read) and request.cache_id == 0:
                    wire.send(m.Sending(PROBE_NBYTES))
                    wire.send_bytes(NONCE.ljust(PROBE_NBYTES) + TRAILER.pack(PROBE.generation, 0))
                else:
                    answer(wire, request)

    return serve


def columns(pairs: Sequence[tuple[int, int]]) -> bytes:
    """(address, length) pairs as a Read carries them."""
    return np.array(
        [addr for addr, _ in pairs] + [nbytes for _, nbytes in pairs], dtype="<u8"
    ).tobytes()
