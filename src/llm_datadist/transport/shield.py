"""Shields: what stands between a connection's bytes and the network. No sockets in here.

A shield first proves to each end who the other is; only then does anything of a link pass. Mutual
TLS goes on to seal all bytes (`tls.py`), a shared secret to key all frames (`secret.py`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

from llm_datadist.core.messages import MAX_REQUEST_BODY_NBYTES
from llm_datadist.transport.beginnings import Kind, why_to_leave, why_to_refuse

if TYPE_CHECKING:
    from llm_datadist.transport.certificate import Certificate


class NotAuthentic(Exception):
    """The other end did not prove that it may link."""

    def __init__(
        self, reason: str, parting: bytes = b"", remedy: str = "both ends need the same"
    ) -> None:
        super().__init__(reason)
        #: what to send before the connection is closed, so that the other end knows why
        self.parting = parting
        #: what to do about it
        self.remedy = remedy


class KernelKeys(NamedTuple):
    """What the kernel is given so that it seals a connection: for what is sent, and what comes."""

    sent: bytes
    came: bytes

    def __repr__(self) -> str:  # which logs and tracebacks may show
        return "KernelKeys(...)"


class Shield(Protocol):
    """One connection's. Used by one thread at a time."""

    #: the hand-shake is over
    is_done: bool
    #: the bytes of caches are sealed, too; else only frames go through `seal` and `open`
    seals_all: bool
    #: what does, once the hand-shake is over: "tls", "tls-records", "ktls" (the kernel, and none of
    #: it goes through here), or nothing
    encryption: str
    #: with which the kernel does, to be given to it at once behind the hand-shake (`ktls.py`)
    kernels: KernelKeys | None
    #: so much a stream may carry, either way together
    most_nbytes: float
    #: the peer's, once the hand-shake is over; None where there are none
    peer_certificate: Certificate | None

    def start(self) -> bytes:
        """What to send first."""
        ...

    def answer(self, data: bytes) -> bytes:
        """What to send on what came during the hand-shake. Raises NotAuthentic."""
        ...

    def seal(self, data: bytes | bytearray | memoryview) -> bytes:
        """What to send in place of `data`."""
        ...

    def open(
        self, data: bytes | bytearray | memoryview, max_nbytes: int = MAX_REQUEST_BODY_NBYTES
    ) -> bytes:
        """What the peer meant by `data`, and by all that came before. Raises NotAuthentic.

        No frame has a larger body than `max_nbytes`, where the shield knows of frames.
        """
        ...

    def rest(self) -> None:
        """Nothing is waited for but the peer: what the next frame takes may be done now."""
        ...

    def proof(self, link: Shield) -> bytes:
        """What shows on this connection that its caller is the end of a link with that shield."""
        ...

    def proves(self, link: Shield, proof: bytes) -> bool:
        """Whether the other end of this connection is that of the link."""
        ...


class Open:
    """No security: everybody is let in."""

    is_done = True
    seals_all = False
    encryption = ""
    kernels: KernelKeys | None = None
    most_nbytes = math.inf
    peer_certificate: Certificate | None = None
    _has_met = False

    def start(self) -> bytes:
        return b""

    def answer(self, data: bytes) -> bytes:
        return b""

    def seal(self, data: bytes | bytearray | memoryview) -> bytes:
        return bytes(data)

    def open(
        self, data: bytes | bytearray | memoryview, max_nbytes: int = MAX_REQUEST_BODY_NBYTES
    ) -> bytes:
        opened = bytes(data)
        if opened and not self._has_met:
            self._has_met = True
            if reason := why_to_leave(opened, Kind.OPEN):
                raise NotAuthentic(reason)
            if reason := why_to_refuse(opened, Kind.OPEN):
                raise NotAuthentic(reason, Kind.OPEN.value)
        return opened

    def rest(self) -> None:
        pass

    def proof(self, link: Shield) -> bytes:
        return b""

    def proves(self, link: Shield, proof: bytes) -> bool:
        return True
