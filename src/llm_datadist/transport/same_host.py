"""The same-host socket: where ends of one host meet, and the kernel says who is there.

Its name is an abstract one: no file, no permissions, no directory that both would need; it is seen
by all that share a network namespace, and by nobody else. What an offer says is only the name.
Whoever connects is told by the kernel which process listens, and the listener which one called; so
no end believes the other's word for a process that it then reads from.

A meeting point is such a socket with a name that can be worked out (`links/rendezvous.py`). A link
may begin there as at a TCP port, and by any path but this one, for which its ends then meet at the
same-host socket proper.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from llm_datadist.running import forks
from llm_datadist.system_errors import pass_on_handlers
from llm_datadist.transport.stream import timeval

if TYPE_CHECKING:
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.running.deadline import Deadline

#: an offer can lead nowhere but to sockets of this library
_PREFIX = b"\0llm-datadist-"
_MEETING_PREFIX = _PREFIX + b"meet-"
_ID_NBYTES = 16
_BACKLOG = 512
_UCRED = struct.Struct("3i")
#: since Linux 6.5; Python has no name for it yet
_SO_PEERPIDFD = 77


class SameHostOffer(msgspec.Struct, frozen=True, array_like=True):
    """What a listener says of its same-host socket."""

    #: which host, for the reason why the socket is not found there; empty when it cannot be told
    host: str
    id: bytes


class SameHost(NamedTuple):
    """The address of a same-host socket, or of a meeting point."""

    id: bytes
    is_meeting_point: bool = False

    def __str__(self) -> str:
        what = "meeting point" if self.is_meeting_point else "same-host socket"
        return f"the {what} {self.id.hex()[:8]}" if self.id else "this host"

    @property
    def sockaddr(self) -> bytes:
        """What sockets take."""
        prefix = _MEETING_PREFIX if self.is_meeting_point else _PREFIX
        return prefix + self.id.hex().encode()

    @classmethod
    def new(cls) -> SameHost:
        """One that nobody can guess."""
        return cls(secrets.token_bytes(_ID_NBYTES))

    @classmethod
    def of_caller(cls, sock: socket.socket) -> SameHost:
        """That of an end which called on this connection: nobody can connect to it."""
        return cls(b"", sock.getsockname().startswith(_MEETING_PREFIX))

    @classmethod
    def offered(cls, offer: bytes) -> tuple[SameHost, bool | None]:
        """The address in an offer, and whether it says that it is on this host: None, if unknown.

        Raises ValueError when it cannot be read.
        """
        said = msgspec.msgpack.decode(offer, type=SameHostOffer)
        if len(said.id) != _ID_NBYTES:
            raise ValueError(f"a name of {len(said.id)} bytes")
        ours = _host()
        return cls(said.id), said.host == ours if said.host and ours else None

    def offer(self) -> bytes:
        """The reverse of `offered`."""
        return msgspec.msgpack.encode(SameHostOffer(_host(), self.id))

    def is_taken(self) -> bool:
        """Whether somebody is there. Disturbs nobody. Raises OSError."""
        with forks.open_socket(socket.AF_UNIX) as probe:
            try:
                probe.bind(self.sockaddr)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return True
                raise
        return False

    def listen(self) -> socket.socket:
        """A listening socket. Raises OSError."""
        sock = forks.open_socket(socket.AF_UNIX)
        try:
            sock.bind(self.sockaddr)
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock

    def try_to_connect(self, sock: socket.socket) -> bool:
        """Connects without a wait; False while the listener's queue is full. Raises OSError."""
        try:
            sock.connect(self.sockaddr)
        except BlockingIOError:
            return False
        return True

    def connect(
        self, deadline: Deadline, opened: list[socket.socket] | None = None
    ) -> socket.socket:
        """A connection. Raises OSError: BlockingIOError when the listener does not take it in time.

        The kernel waits while the listener's queue is full, as long as it may. The socket is noted
        in `opened` before it is open.
        """
        sock = forks.open_socket(socket.AF_UNIX, opened)
        try:
            if deadline.token is not None:
                deadline.token.require()
            left_s = timeval(deadline.require(f"connecting to {self}"))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, left_s)
            sock.connect(self.sockaddr)
        except BaseException:
            sock.close()
            raise
        return sock


#: where connections of a link go
Address: TypeAlias = "Endpoint | SameHost"


@dataclass(frozen=True)
class Process:
    """The process at the other end of a same-host connection: it connected, or listened.

    It may have ended, and left the connection to others; its number may then be another's.
    """

    #: 0: it is in a PID namespace that this process does not see
    pid: int
    uid: int
    _socket: socket.socket = field(compare=False, repr=False)

    @classmethod
    def of(cls, sock: socket.socket) -> Process:
        """As the kernel knows it. Raises OSError."""
        ucred = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(ucred)
        return cls(pid, uid, sock)

    @property
    def objection(self) -> str:
        """Why this process may not share a path with it: it is another user's; else empty."""
        uid = os.geteuid()
        if self.uid == uid:
            return ""
        return f"run both processes as the same user (here {uid}, the peer {self.uid})"

    @property
    def is_stopped(self) -> bool:
        """By a signal, or a debugger; False where that cannot be told, as of one that is gone."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError as error:
            pass_on_handlers(error)
            return False
        return state.rpartition(")")[2].split()[0] in ("T", "t")

    def open_pidfd(self) -> int | None:
        """What stands for this very process, whoever has its number; None where it cannot be had.

        While the connection is open. Raises OSError, as when the process is gone.
        """
        try:
            return self._socket.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError as error:
            pass_on_handlers(error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return None
            if error.errno != errno.ENOPROTOOPT:
                raise
        try:  # an older kernel: whoever has the number now
            return os.pidfd_open(self.pid)
        except ProcessLookupError:
            raise
        except OSError as error:  # an old kernel, or a sandbox
            pass_on_handlers(error)
            return None


def _host() -> str:
    """Names this host until its next start; empty where the system does not tell.

    A service's or a sandbox's /proc may lack it.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as error:
        pass_on_handlers(error)
        return ""
