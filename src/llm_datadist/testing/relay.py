"""The inside of `faults.FaultProxy`: one thread that passes bytes between sockets."""

from __future__ import annotations

import errno
import selectors
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK_NBYTES = 256 * 1024
#: how many seconds' worth of bytes a slow network passes on at once
_SLICE_S = 0.02
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_COMMAND_S = 10.0


@dataclass
class Faults:
    """What is wrong at present; directions by whether they lead to the caller."""

    is_cut: bool = False
    is_stalled: bool = False
    half_closed: set[bool] = field(default_factory=set)
    cut_after: dict[bool, int] = field(default_factory=dict)
    flip_after: dict[bool, int] = field(default_factory=dict)
    nbytes_per_s: float = 0.0
    #: when a slow network takes the next bytes
    next_at: float = 0.0

    @property
    def can_read(self) -> bool:
        return not self.is_stalled

    def can_write(self, now: float) -> bool:
        return not self.is_stalled and self.next_at <= now


class Relay:
    """Accepts callers, connects each to the listener, and applies the faults there are.

    All but `do` belongs to its thread; others may look at the counts.
    """

    def __init__(self, port: int, host: str, own_port: int = 0) -> None:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._family, self._target = info[0], info[4]
        self._server = socket.create_server(("127.0.0.1", own_port), backlog=512)
        self._server.setblocking(False)
        self.port: int = self._server.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._commands: deque[Callable[[], None]] = deque()
        self.faults = Faults()
        self.connections: set[Connection] = set()
        #: bytes passed on, by whether they went to the caller
        self.passed = {True: 0, False: 0}
        #: a cut or a flipped bit that was waited for has come
        self.came = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._thread.start()

    def do(self, command: Callable[[], None]) -> None:
        """From any other thread: has the relay's thread do this, and waits for it."""
        done = threading.Event()

        def run() -> None:
            try:
                command()
            finally:
                done.set()

        self._commands.append(run)
        self._wake.send(b"\0")
        if not done.wait(_COMMAND_S):
            raise RuntimeError("the relay's thread does not answer: has it failed?")

    def close(self) -> None:
        """From any other thread. May be called again."""

        def command() -> None:
            self._is_closing = True

        if self._thread.is_alive():
            self.do(command)
            self._thread.join()
            self._wake.close()

    def cut(self) -> None:
        self.faults.is_cut = True
        self.faults.cut_after.clear()
        for connection in list(self.connections):
            self._drop(connection, is_reset=True)
        self.came.set()

    def _run(self) -> None:
        try:
            while not self._is_closing:
                now = time.monotonic()  # one for both: what is not watched now is waited for
                self._rearm(now)
                pause_s = self.faults.next_at - now
                for key, events in self._selector.select(pause_s if pause_s > 0 else None):
                    self._handle(key, events)
        finally:
            for connection in list(self.connections):
                self._drop(connection, is_reset=False)
            self._selector.close()
            self._server.close()
            self._woken.close()

    def _rearm(self, now: float) -> None:
        """Watches for what can go on now."""
        can_read, can_write = self.faults.can_read, self.faults.can_write(now)
        self._watch(self._server, selectors.EVENT_READ if can_read else 0)
        # who is watched first is served first, and a slow network serves one at a time
        for connection in sorted(self.connections, key=lambda each: each.served_at):
            interests = connection.interests(can_read=can_read, can_write=can_write)
            for sock, events in interests.items():
                self._watch(sock, events, connection)

    def _watch(
        self, sock: socket.socket, events: int, connection: Connection | None = None
    ) -> None:
        key = self._selector.get_map().get(sock)
        if key is None:
            if events:
                self._selector.register(sock, events, connection)
        elif not events:
            self._selector.unregister(sock)
        elif events != key.events:
            self._selector.modify(sock, events, connection)

    def _handle(self, key: selectors.SelectorKey, events: int) -> None:
        if key.fileobj is self._woken:
            self._woken.recv(4096)
            while self._commands:
                self._commands.popleft()()
        elif key.fileobj is self._server:
            self._accept()
        elif key.data in self.connections:  # what came before this event may have dropped it
            connection: Connection = key.data
            try:
                self._serve(connection, key.fileobj, events)
            except OSError:  # an end that is gone takes the other with it
                self._drop(connection, is_reset=True)

    def _accept(self) -> None:
        try:
            caller, _ = self._server.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it has gone again
        listener = socket.socket(self._family)
        connection = Connection(caller, listener)
        self.connections.add(connection)
        for to_caller in self.faults.half_closed:
            connection.pipes[to_caller].end()
        is_lost = self.faults.is_cut
        if is_lost or listener.connect_ex(self._target) not in (0, errno.EINPROGRESS):
            self._drop(connection, is_reset=True)

    def _serve(self, connection: Connection, ready: object, events: int) -> None:
        for pipe in connection.pipes.values():
            if ready is pipe.source and events & selectors.EVENT_READ and pipe.can_take:
                with suppress(BlockingIOError):
                    pipe.take(self._flip)
            if pipe.is_end_due and ready is pipe.target and events & selectors.EVENT_WRITE:
                pipe.tell_end()
            elif pipe.chunk and self.faults.can_write(time.monotonic()):
                with suppress(BlockingIOError):
                    self._pass_on(pipe)
                connection.served_at = time.monotonic()
            if connection not in self.connections:
                return  # that was the byte to cut behind
        if all(pipe.is_done for pipe in connection.pipes.values()):
            self._drop(connection, is_reset=False)

    def _pass_on(self, pipe: Pipe) -> None:
        faults, direction = self.faults, pipe.is_to_caller
        most = faults.cut_after.get(direction, _CHUNK_NBYTES)
        if faults.nbytes_per_s:
            most = min(most, max(1, int(_SLICE_S * faults.nbytes_per_s)))
        sent = pipe.target.send(pipe.chunk[:most])
        pipe.chunk = pipe.chunk[sent:]
        self.passed[direction] += sent
        if faults.nbytes_per_s:
            due = max(faults.next_at, time.monotonic() - _SLICE_S)  # makes up for waking up late
            faults.next_at = due + sent / faults.nbytes_per_s
        if direction in faults.cut_after:
            faults.cut_after[direction] -= sent
            if faults.cut_after[direction] <= 0:
                self.cut()

    def _flip(self, data: bytearray, to_caller: bool) -> None:
        after = self.faults.flip_after.pop(to_caller, None)
        if after is None:
            return
        if after < len(data):
            data[after] ^= 1
            self.came.set()
        else:
            self.faults.flip_after[to_caller] = after - len(data)

    def _drop(self, connection: Connection, *, is_reset: bool) -> None:
        self.connections.discard(connection)
        for sock in (connection.caller, connection.listener):
            self._watch(sock, 0)
            if is_reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            sock.close()


class Connection:
    """A caller, and the connection to the listener that was made for it."""

    def __init__(self, caller: socket.socket, listener: socket.socket) -> None:
        self.caller, self.listener = caller, listener
        #: when bytes were passed on last
        self.served_at = 0.0
        for sock in (caller, listener):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        #: by whether it leads to the caller
        self.pipes = {
            True: Pipe(listener, caller, is_to_caller=True),
            False: Pipe(caller, listener, is_to_caller=False),
        }

    def interests(self, *, can_read: bool, can_write: bool) -> dict[socket.socket, int]:
        """What each socket is to be watched for."""
        events = {self.caller: 0, self.listener: 0}
        for pipe in self.pipes.values():
            if can_write and (pipe.chunk or pipe.is_end_due):
                events[pipe.target] |= selectors.EVENT_WRITE
            if can_read and pipe.can_take:
                events[pipe.source] |= selectors.EVENT_READ
        return events


class Pipe:
    """One direction of a connection, with at most one chunk under way."""

    def __init__(self, source: socket.socket, target: socket.socket, *, is_to_caller: bool) -> None:
        self.source, self.target, self.is_to_caller = source, target, is_to_caller
        self.chunk = memoryview(b"")
        #: the target is to be told, or was told, that this was all
        self.is_end_due = self._is_end_told = False
        self._has_source_ended = False

    @property
    def can_take(self) -> bool:
        return not self.chunk and not self._has_source_ended

    @property
    def is_done(self) -> bool:
        return self._has_source_ended and self._is_end_told

    def take(self, alter: Callable[[bytearray, bool], None]) -> None:
        """Reads the next chunk, which is thrown away if the target hears no more."""
        data = bytearray(self.source.recv(_CHUNK_NBYTES))
        if not data:
            self._has_source_ended = True
            self.end()
        elif not self.is_end_due and not self._is_end_told:
            alter(data, self.is_to_caller)
            self.chunk = memoryview(data)

    def end(self) -> None:
        """The target will be told that this was all, as soon as it can be."""
        self.chunk = memoryview(b"")
        self.is_end_due = not self._is_end_told

    def tell_end(self) -> None:
        self.target.shutdown(socket.SHUT_WR)
        self.is_end_due, self._is_end_told = False, True
