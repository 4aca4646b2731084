"""The control connection of a link: messages on a non-blocking socket, in the cluster's loop."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import secrets
import socket
import termios
from array import array
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from llm_datadist.core import messages as m
from llm_datadist.core.connection_names import NAME_NBYTES, Ends, named, renamed
from llm_datadist.core.frames import FrameReader
from llm_datadist.endpoint import Endpoint
from llm_datadist.running import forks
from llm_datadist.running.deadline import Deadline
from llm_datadist.transport import ktls
from llm_datadist.transport.same_host import Process, SameHost
from llm_datadist.transport.shield import NotAuthentic

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from llm_datadist.transport.same_host import Address
    from llm_datadist.transport.shield import Shield

#: control messages are small, and each connection that waits has room for so much
_CHUNK_NBYTES = 4 * 1024
_KEEPALIVE = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    # a host that vanishes without a word is noticed after 10 + 3 * 5 seconds, by the kernel
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
_VANISHED_MS = 25_000
_QUEUE_FULL_S = 0.01
#: control messages are small: whoever leaves so much of them does not read
_MOST_UNSENT = 256 * 1024


class ConnectionEnded(Exception):
    """The peer closed the connection or broke the protocol on it."""


class Unwelcome(ConnectionEnded):
    """One end did not prove that it may link."""


class AnotherUser(ConnectionEnded):
    """At a same-host socket a process of another user listens."""


class Control:
    """One connection. Belongs to the loop's thread."""

    def __init__(
        self, sock: socket.socket, at: Address, shield: Shield, *, is_caller: bool = True
    ) -> None:
        """Raises OSError when it has ended meanwhile."""
        sock.setblocking(False)
        #: the peer, where the kernel says who that is
        self.process: Process | None = None
        if sock.family == socket.AF_UNIX:
            self.process = Process.of(sock)
        else:
            for level, option, value in _KEEPALIVE:
                sock.setsockopt(level, option, value)
        self.socket = sock
        #: the peer's; the socket no longer knows it when the peer has reset the connection
        self.at = at
        self._ends = _ends_of(sock, is_caller=is_caller)
        #: names the connection among all (core/connection_names.py); as long as it cannot be told
        #: apart that is a name which nobody answers to
        self.name = secrets.token_bytes(NAME_NBYTES)
        self._is_named = False
        self.shield = shield
        #: what the system has not taken yet, in order
        self._unsent = bytearray()
        self._is_writing = False
        self._flushed = asyncio.Event()
        #: holds what came behind the message received last
        self.frames = FrameReader()

    @property
    def is_same_host(self) -> bool:
        """It is one to a same-host socket, and so for links of that path alone."""
        return isinstance(self.at, SameHost) and not self.at.is_meeting_point

    @property
    def reached(self) -> tuple[str, int] | None:
        """Over TCP: the other end's address, which its name stands for."""
        with suppress(OSError):  # it has ended
            if self.socket.family != socket.AF_UNIX:
                host, port, *_ = self.socket.getpeername()
                return host, port
        return None

    @property
    def is_unheard(self) -> bool:
        """Over TCP: whether the peer's host has not acknowledged all that was said so far."""
        unsent = array("i", (0,))
        with suppress(OSError):  # it is closed
            fcntl.ioctl(self.socket, termios.TIOCOUTQ, unsent)
        return unsent[0] > 0

    def begun(self, first: m.Hello | m.Forget) -> None:
        """The caller said this first; without a nonce the connection is not told apart."""
        if first.nonce and self._ends is not None:
            key = self.shield.proof(self.shield)  # both ends can make it, and nobody else
            self.name, self._is_named = named(self._ends, first, key), True

    def answered(self, instance: bytes, token: bytes) -> None:
        """The listener did, by a Welcome."""
        if self._is_named:
            self.name = renamed(self.name, instance, token)

    def watch(self) -> None:
        """Has the connection end soon after the peer's host vanished while a message was under way.

        Keep-alive leaves that to the retransmissions, which go on for a quarter of an hour.
        """
        if self.process is None:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _VANISHED_MS)

    async def greet(self) -> None:
        """The shield's hand-shake, first of all. Raises Unwelcome."""
        try:
            self._send(self.shield.start())
            while not self.shield.is_done:
                self._send(self.shield.answer(await self._receive()))
            self.frames.feed(self.shield.open(b"", self.frames.max_nbytes))
        except NotAuthentic as error:
            await self._part(error)
            raise Unwelcome(f"link security: {error}; {error.remedy}") from error
        except ConnectionEnded as error:
            raise Unwelcome(f"link security: {error}; both ends need the same") from error
        await self._hand_over()

    async def _hand_over(self) -> None:
        """To the kernel, if that is to seal: behind our last word. Raises Unwelcome."""
        if (keys := self.shield.kernels) is None:
            return
        await self.flushed()
        try:
            ktls.hand_over(self.socket, keys)
        except OSError as error:
            raise Unwelcome(f"link security: {ktls.why_not_taken(error)}") from error

    async def send(self, message: m.Message) -> None:
        """Sends without a wait, in order. Raises ConnectionEnded.

        A peer that takes nothing of what it is told ends the connection after a while.
        """
        if len(self._unsent) > _MOST_UNSENT:
            self.end()
            raise ConnectionEnded("the peer takes nothing of what it is told")
        self._send(self.shield.seal(m.encode(message)))

    async def flushed(self) -> None:
        """Waits until the system has taken all. Raises ConnectionEnded."""
        while self._unsent:
            self._flushed.clear()
            await self._flushed.wait()

    async def taken(self) -> None:
        """Waits until it can be closed, and what was sent arrives. Raises ConnectionEnded.

        What the kernel seals it may have taken, and not sent: a close drops that. So the peer must
        leave first.
        """
        await self.flushed()
        if self.shield.kernels is not None:
            with suppress(ConnectionEnded, NotAuthentic):
                await self._receive()

    async def receive(self) -> m.AnyMessage:
        """Raises ConnectionEnded."""
        try:
            while True:
                for message in self.frames:
                    return message
                data = await self._receive()
                self.frames.feed(self.shield.open(data, self.frames.max_nbytes))
        except NotAuthentic as error:
            await self._part(error)
            raise Unwelcome(f"link security: {error}") from error
        except m.ProtocolError as error:
            raise ConnectionEnded(str(error)) from error

    async def _part(self, error: NotAuthentic) -> None:
        """Tells the peer why, as far as the shield has words for it."""
        with suppress(ConnectionEnded):  # it has left already
            self._send(error.parting)

    def _send(self, data: bytes) -> None:
        self._unsent += data
        if not self._is_writing:
            try:
                self._write()
            except OSError as error:
                raise ConnectionEnded(error.strerror or str(error)) from error

    def _write(self) -> None:
        """Raises OSError."""
        try:
            while self._unsent:
                del self._unsent[: self.socket.send(self._unsent)]
        except BlockingIOError:
            if not self._is_writing:
                self._is_writing = True
                asyncio.get_running_loop().add_writer(self.socket, self._go_on)
        except OSError:
            self._stop_writing()
            raise
        else:
            self._stop_writing()

    def _go_on(self) -> None:
        with suppress(OSError):  # whoever receives notices
            self._write()

    def _stop_writing(self) -> None:
        self._unsent.clear()
        self._flushed.set()
        if self._is_writing:
            self._is_writing = False
            asyncio.get_running_loop().remove_writer(self.socket)

    async def _receive(self) -> bytes:
        try:
            if self.shield.kernels is None:
                data = await asyncio.get_running_loop().sock_recv(self.socket, _CHUNK_NBYTES)
            else:
                data = await self._receive_opened()
        except OSError as error:
            if reason := ktls.why_broken(self.shield, error):
                raise NotAuthentic(reason) from error
            raise ConnectionEnded(error.strerror or str(error)) from error
        if not data:
            raise ConnectionEnded("the peer closed the connection")
        return data

    async def _receive_opened(self) -> bytes:
        """What the kernel has opened. Raises OSError."""
        pause_s = 0.0
        while True:
            try:
                return self.socket.recv(_CHUNK_NBYTES)
            except BlockingIOError:
                await asyncio.sleep(pause_s)
                pause_s = ktls.longer_s(pause_s)
                await self._readable()

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        came = asyncio.Event()
        loop.add_reader(self.socket, came.set)
        try:
            await came.wait()
        finally:
            loop.remove_reader(self.socket)

    def end(self) -> None:
        """Ends the connection; whoever is receiving notices, and then closes it."""
        with suppress(OSError):  # the peer was first
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Only where nothing is receiving: the loop would watch a descriptor that others get."""
        self._stop_writing()
        self.socket.close()


async def dial(at: Address, waiters: Executor, shield: Shield, timeout_s: float) -> Control:
    """Connects and greets; a name is looked up in a thread of the waiters.

    Raises OSError, Unwelcome, AnotherUser, asyncio.TimeoutError.
    """
    return await asyncio.wait_for(_dial(at, waiters, shield, Deadline.after(timeout_s)), timeout_s)


async def _dial(at: Address, waiters: Executor, shield: Shield, deadline: Deadline) -> Control:
    if isinstance(at, SameHost):
        control = await _dial_same_host(at, shield)
    else:
        control = await _dial_endpoint(at, waiters, shield, deadline)
    try:
        if not shield.is_done:
            await control.greet()
    except BaseException:
        control.close()
        raise
    return control


async def _dial_endpoint(
    at: Endpoint, waiters: Executor, shield: Shield, deadline: Deadline
) -> Control:
    loop = asyncio.get_running_loop()
    infos = at.look_up() if at.is_literal else await loop.run_in_executor(waiters, at.look_up)
    for index, info in enumerate(infos[:-1]):
        # "localhost" may be ::1 first, where nobody listens; a host's other network may be dead
        fair_s = max(0.0, deadline.remaining_s()) / (len(infos) - index)
        with suppress(OSError, asyncio.TimeoutError):
            return await asyncio.wait_for(_connect(info, shield), fair_s)
    return await _connect(infos[-1], shield)


def _ends_of(sock: socket.socket, *, is_caller: bool) -> Ends | None:
    try:
        own, peer = _address(sock.getsockname()), _address(sock.getpeername())
    except OSError:  # the peer has reset it
        return None
    if not own or not peer:
        return None
    return Ends(own, peer) if is_caller else Ends(peer, own)


def _address(sockaddr: tuple[Any, ...] | str | bytes) -> str:
    """Of an end; empty for one that has none, or a file: that can be named as anybody likes.

    An abstract name is its end's alone, as an address is.
    """
    if isinstance(sockaddr, bytes):
        return sockaddr.hex()
    if isinstance(sockaddr, str):
        return ""
    host = ipaddress.ip_address(sockaddr[0].partition("%")[0])
    mapped = getattr(host, "ipv4_mapped", None)
    return f"{mapped or host}:{sockaddr[1]}"


async def _dial_same_host(at: SameHost, shield: Shield) -> Control:
    sock = forks.open_socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        sock.bind("")  # a name of its own, by which its ends know it
        # nothing tells the loop that the listener's queue has room again
        while not at.try_to_connect(sock):  # noqa: ASYNC110
            await asyncio.sleep(_QUEUE_FULL_S)
        control = Control(sock, at, shield)
        # before anything is said: the path is for one user alone, and others can take the name
        if not at.is_meeting_point and (objection := Process.of(sock).objection):
            raise AnotherUser(objection)
        return control
    except BaseException:
        sock.close()
        raise


async def _connect(info: tuple[Any, ...], shield: Shield) -> Control:
    family, _, _, _, address = info
    sock = forks.open_socket(family)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return Control(sock, Endpoint.of(address), shield)
    except BaseException:
        sock.close()
        raise
