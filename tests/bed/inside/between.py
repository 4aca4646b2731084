"""Somebody in between who sees records of TLS pass, and may pass on others in their place."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

HEAD_NBYTES = 5


class Between:
    """Relays TCP to a listener of this host. A context manager."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        #: what is passed on in place of a record that the listener sends
        self.alter: Callable[[bytes], bytes] = bytes
        #: so much is passed on at a time; 0: whole records
        self.piece_nbytes = 0
        #: all that was on the wire, either way
        self.seen = bytearray()
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._server.close()
        _end(*self._socks)
        for thread in self._threads[1:]:
            thread.join()
        for sock in self._socks:
            sock.close()

    def _accept(self) -> None:
        with suppress(OSError):  # it was shut down
            while True:
                caller = self._server.accept()[0]
                listener = socket.create_connection(("127.0.0.1", self._target))
                self._socks += caller, listener
                for source, target in ((caller, listener), (listener, caller)):
                    target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    passing = threading.Thread(
                        target=self._pass, args=(source, target, source is listener)
                    )
                    self._threads.append(passing)
                    passing.start()

    def _pass(self, source: socket.socket, target: socket.socket, is_listeners: bool) -> None:
        with suppress(EOFError, OSError):  # an end that is gone takes the other with it
            while True:
                head = _receive(source, HEAD_NBYTES)
                record = head + _receive(source, int.from_bytes(head[3:], "big"))
                self.seen += record
                passed = self.alter(record) if is_listeners else record
                step = self.piece_nbytes or max(1, len(passed))
                for at in range(0, len(passed), step):
                    target.sendall(passed[at : at + step])
        _end(source, target)


def _receive(sock: socket.socket, nbytes: int) -> bytes:
    data = sock.recv(nbytes, socket.MSG_WAITALL)
    if len(data) < nbytes:
        raise EOFError
    return data


def _end(*socks: socket.socket) -> None:
    for sock in socks:
        with suppress(OSError):  # it has ended already
            sock.shutdown(socket.SHUT_RDWR)
