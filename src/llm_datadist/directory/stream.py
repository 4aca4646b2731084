"""A stream of JSON lines out of one HTTP answer, whose wait any thread may interrupt."""

from __future__ import annotations

import os
import select
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from llm_datadist.directory.chunks import Chunks
from llm_datadist.directory.gateway import headers_of
from llm_datadist.locks import make_lock

if TYPE_CHECKING:
    from llm_datadist.directory.gateway import Gateway

_TIMEOUT_S: Final = 5.0
#: a server whose host is gone says nothing: the kernel finds out in seconds
_ALIVE: Final = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
_READ_NBYTES: Final = 64 * 1024


class Stream:
    """One connection at a time. For one thread, but for `interrupt`. Raises OSError, ValueError."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self._chunks = Chunks()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = make_lock()  # else an interruption could meet another file's number
        self.is_interrupted = False

    def connect(self, gateway: Gateway, path: str, body: dict[str, Any]) -> None:
        """Asks the question; its answer is what is received from here on."""
        self.disconnect()
        headers = headers_of(gateway.token())
        connection = gateway.connect(_TIMEOUT_S)
        connection.connect()
        sock = self._sock = connection.sock
        for option, value in _ALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        data = msgspec.json.encode(body)
        head = [
            f"POST {path} HTTP/1.1",
            f"Host: {gateway.host}:{gateway.port}",
            *(f"{name}: {value}" for name, value in headers.items()),
            f"Content-Length: {len(data)}",
        ]
        sock.sendall("\r\n".join([*head, "", ""]).encode() + data)
        sock.setblocking(False)
        self._chunks = Chunks()

    def receive(self, until: float) -> list[dict[str, Any]]:
        """What has come, as soon as something has; nothing at that time, or when interrupted."""
        assert self._sock is not None
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._sock, select.POLLIN)
        while not self.is_interrupted:
            said = [_object(line) for line in self._chunks.add(self._read())]
            left_s = until - time.monotonic()
            if said or left_s <= 0:
                return said
            poll.poll(left_s * 1000 + 1)
        return []

    def interrupt(self) -> None:
        """In any thread. May be called again."""
        with self._lock:
            self.is_interrupted = True
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def disconnect(self) -> None:
        """May be called again."""
        if self._sock is not None:
            self._sock.close()
        self._sock = None

    def close(self) -> None:
        """May be called again."""
        self.disconnect()
        with self._lock:
            if self._wake >= 0:
                os.close(self._wake)
            self._wake = -1

    def _read(self) -> bytes:
        """What is there; read before a wait, since TLS may have more than the kernel knows of."""
        assert self._sock is not None
        try:
            data = self._sock.recv(_READ_NBYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return b""
        if not data:
            raise ConnectionResetError("the server has closed the connection")
        return data


def _object(line: bytes) -> dict[str, Any]:
    value = msgspec.json.decode(line)
    if not isinstance(value, dict):
        raise ValueError(f"no object: {line!r:.100}")
    return value
