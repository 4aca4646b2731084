"""The control connection of a link: messages on a non-blocking socket, in the engine's loop."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from llm_datadist.core import messages as m
from llm_datadist.core.frames import FrameReader
from llm_datadist.endpoint import is_ip_literal

if TYPE_CHECKING:
    from concurrent.futures import Executor

_CHUNK_NBYTES = 64 * 1024
_KEEPALIVE = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    # a host that vanishes without a word is noticed after 10 + 3 * 5 seconds, by the kernel
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class ConnectionEnded(Exception):
    """The peer closed the connection or broke the protocol on it."""


class Control:
    """One connection. Belongs to the loop's thread."""

    def __init__(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        sock.setblocking(False)
        for level, option, value in _KEEPALIVE:
            sock.setsockopt(level, option, value)
        self.socket = sock
        #: the peer's; the socket no longer knows it when the peer has reset the connection
        self.address = address
        #: holds what came behind the message received last
        self.frames = FrameReader()

    def trust(self) -> None:
        """The peer is known: accept frames of full size."""
        self.frames.max_nbytes = m.MAX_BODY_NBYTES

    async def send(self, message: m.Message) -> None:
        """Raises ConnectionEnded."""
        try:
            await asyncio.get_running_loop().sock_sendall(self.socket, m.encode(message))
        except OSError as error:
            raise ConnectionEnded(error.strerror or str(error)) from error

    async def receive(self) -> m.AnyMessage:
        """Raises ConnectionEnded."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                for message in self.frames:
                    return message
                data = await loop.sock_recv(self.socket, _CHUNK_NBYTES)
                if not data:
                    raise ConnectionEnded("the peer closed the connection")
                self.frames.feed(data)
        except OSError as error:
            raise ConnectionEnded(error.strerror or str(error)) from error
        except m.ProtocolError as error:
            raise ConnectionEnded(str(error)) from error

    def end(self) -> None:
        """Ends the connection; whoever is receiving notices, and then closes it."""
        with suppress(OSError):  # the peer was first
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Only where nothing is receiving: the loop would watch a descriptor that others get."""
        self.socket.close()


async def dial(host: str, port: int, waiters: Executor) -> Control:
    """Connects; a name is looked up in a thread of the waiters. Raises OSError."""
    loop = asyncio.get_running_loop()
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    if is_ip_literal(host):
        infos = look_up()
    else:
        infos = await loop.run_in_executor(waiters, look_up)
    for info in infos[:-1]:
        with suppress(OSError):  # "localhost" may be ::1 first, where nobody listens
            return await _connect(*info)
    return await _connect(*infos[-1])


async def _connect(
    family: int, kind: int, protocol: int, _: str, address: tuple[Any, ...]
) -> Control:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return Control(sock, address)
    except BaseException:
        sock.close()
        raise
