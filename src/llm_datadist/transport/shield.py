"""Shields: what stands between a connection's bytes and the network. No sockets in here.

A shield first proves to each end who the other is; only then does anything of a link pass. Mutual
TLS goes on to seal all bytes. A shared secret keys the connection: every frame behind the
hand-shake carries a MAC under a key that only the two ends have, over its direction and its number,
so that nothing can be injected, replayed, reordered, left out or reflected, and whoever merely
passed the hand-shake on has nothing to say. The bytes of caches pass as they are.
"""

from __future__ import annotations

import hmac
import secrets
import ssl
import struct
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Protocol

from llm_datadist.core.messages import HEADER, MAX_REQUEST_BODY_NBYTES
from llm_datadist.link_security import read_secret
from llm_datadist.transport.beginnings import Kind, why_to_leave, why_to_refuse
from llm_datadist.transport.certificate import REMEDY, Certificate, explain
from llm_datadist.transport.credentials import load_tls
from llm_datadist.transport.renewed import Renewed

if TYPE_CHECKING:
    from llm_datadist.link_security import LinkSecurity
    from llm_datadist.transport.credentials import TlsContexts

_NONCE_NBYTES: Final = 32
_MAC_NBYTES: Final = 32
_GREETING: Final = b"LDSECRT1"
#: the listener's word that it accepts the caller's certificate: TLS 1.3 does not wait for that
_ACCEPTED: Final = b"\x01"
#: what TLS seals at a time, and gives back at most
_RECORD_NBYTES: Final = 16 * 1024
_TAG_NBYTES: Final = 16
#: what stands in front of a keyed frame: its length and its MAC
_KEYED: Final = struct.Struct(f"<I{_TAG_NBYTES}s")
KEYED_HEAD_NBYTES: Final = _KEYED.size
_COUNT: Final = struct.Struct("<Q")


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


class Shield(Protocol):
    """One connection's. Used by one thread at a time."""

    #: the hand-shake is over
    is_done: bool
    #: the bytes of caches are sealed, too; else only frames go through `seal` and `open`
    seals_all: bool
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

    def open(self, data: bytes | bytearray | memoryview) -> bytes:
        """What the peer meant by `data`, and by all that came before. Raises NotAuthentic."""
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
    peer_certificate: Certificate | None = None
    _has_met = False

    def start(self) -> bytes:
        return b""

    def answer(self, data: bytes) -> bytes:
        return b""

    def seal(self, data: bytes | bytearray | memoryview) -> bytes:
        return bytes(data)

    def open(self, data: bytes | bytearray | memoryview) -> bytes:
        opened = bytes(data)
        if opened and not self._has_met:
            self._has_met = True
            if reason := why_to_leave(opened, Kind.OPEN):
                raise NotAuthentic(reason)
            if reason := why_to_refuse(opened, Kind.OPEN):
                raise NotAuthentic(reason, Kind.OPEN.value)
        return opened

    def proof(self, link: Shield) -> bytes:
        return b""

    def proves(self, link: Shield, proof: bytes) -> bool:
        return True


class Secret(Open):
    """Both ends answer the other's challenge with a MAC that only the secret makes.

    Both nonces and the secret make the key of the session; of that, each direction has its own.
    """

    def __init__(self, secret: bytes, *, is_caller: bool) -> None:
        self.is_done = False
        self._secret = secret
        self._is_caller = is_caller
        self._mine = secrets.token_bytes(_NONCE_NBYTES)
        self._nonces = b""
        self._came = bytearray()
        self._session_key = b""
        #: the keys of what is sent and of what comes, and how many frames there were
        self._keys = b"", b""
        self._sent = self._opened = 0

    def start(self) -> bytes:
        return _GREETING + self._mine if self._is_caller else b""

    def answer(self, data: bytes) -> bytes:
        self._came += data
        if self._is_caller:
            return self._answer_listener()
        return self._answer_caller()

    def seal(self, data: bytes | bytearray | memoryview) -> bytes:
        tag = _tag(self._keys[0], self._sent, data)
        self._sent += 1
        return b"".join((_KEYED.pack(len(data), tag), data))

    def open(self, data: bytes | bytearray | memoryview) -> bytes:
        self._came += data
        frames = []
        while len(self._came) >= KEYED_HEAD_NBYTES:
            end = KEYED_HEAD_NBYTES + self.frame_nbytes(self._came)
            if len(self._came) < end:
                break
            frames.append(
                self.open_frame(self._take(KEYED_HEAD_NBYTES), self._take(end - KEYED_HEAD_NBYTES))
            )
        return b"".join(frames)

    def frame_nbytes(
        self, head: bytes | bytearray, max_nbytes: int = MAX_REQUEST_BODY_NBYTES
    ) -> int:
        """How long the frame behind its head is. Raises NotAuthentic."""
        nbytes: int = _KEYED.unpack_from(head)[0]
        if nbytes > HEADER.size + max_nbytes:
            raise NotAuthentic("it sent what is no keyed frame")
        return nbytes

    def open_frame(self, head: bytes | bytearray, frame: bytes | bytearray) -> bytes | bytearray:
        """The frame, when it is the peer's next one. Raises NotAuthentic."""
        _, tag = _KEYED.unpack(head)
        if not hmac.compare_digest(tag, _tag(self._keys[1], self._opened, frame)):
            raise NotAuthentic("a frame is not the peer's next one: somebody is in between")
        self._opened += 1
        return frame

    def proof(self, link: Shield) -> bytes:
        assert isinstance(link, Secret)
        return _mac(link._session_key, b"stream" + self._nonces)

    def proves(self, link: Shield, proof: bytes) -> bool:
        return hmac.compare_digest(proof, self.proof(link))

    def _answer_listener(self) -> bytes:
        if not self._nonces and (reason := why_to_leave(self._came, Kind.SECRET)):
            raise NotAuthentic(reason)
        if len(self._came) < _NONCE_NBYTES + _MAC_NBYTES:
            return b""
        self._nonces = self._mine + self._take(_NONCE_NBYTES)
        self._check(self._take(_MAC_NBYTES), b"listener")
        self._begin()
        return self._mac(b"caller")

    def _answer_caller(self) -> bytes:
        if not self._nonces:
            if not _GREETING.startswith(bytes(self._came[: len(_GREETING)])):
                reason = why_to_refuse(self._came, Kind.SECRET)
                raise NotAuthentic(reason, Kind.SECRET.value)
            if len(self._came) < len(_GREETING) + _NONCE_NBYTES:
                return b""
            self._take(len(_GREETING))
            self._nonces = self._take(_NONCE_NBYTES) + self._mine
            return self._mine + self._mac(b"listener")
        if len(self._came) >= _MAC_NBYTES:
            self._check(self._take(_MAC_NBYTES), b"caller")
            self._begin()
        return b""

    def _begin(self) -> None:
        self._session_key = self._mac(b"session")
        keys = (_mac(self._session_key, who) for who in (b"caller", b"listener"))
        callers, listeners = keys
        self._keys = (callers, listeners) if self._is_caller else (listeners, callers)
        self.is_done = True

    def _take(self, count: int) -> bytes:
        taken = bytes(self._came[:count])
        del self._came[:count]
        return taken

    def _mac(self, who: bytes) -> bytes:
        return _mac(self._secret, who + self._nonces)

    def _check(self, mac: bytes, who: bytes) -> None:
        if not hmac.compare_digest(mac, self._mac(who)):
            raise NotAuthentic("it does not know the shared secret")


def _mac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def _tag(key: bytes, number: int, frame: bytes | bytearray | memoryview) -> bytes:
    """Of a frame: BLAKE2 in its keyed mode, which takes a third of HMAC's time on small ones."""
    tag = blake2b(_COUNT.pack(number), digest_size=_TAG_NBYTES, key=key)
    tag.update(frame)
    return tag.digest()


class Tls(Open):
    """Mutual TLS 1.3: each end has a certificate of one authority, and all bytes are sealed."""

    seals_all = True

    def __init__(self, context: ssl.SSLContext, *, is_caller: bool) -> None:
        self.is_done = False
        self._is_caller = is_caller
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=not is_caller)
        self._is_tls_done = False

    def start(self) -> bytes:
        return self.answer(b"") if self._is_caller else b""

    def answer(self, data: bytes) -> bytes:
        if data and not self._has_met:
            self._has_met = True
            self._meet(data)
        self._incoming.write(data)
        try:
            if not self._is_tls_done:
                self._tls.do_handshake()
                self._is_tls_done = True
                self.peer_certificate = Certificate.of_peer(self._tls)
                if not self._is_caller:
                    self._tls.write(_ACCEPTED)
                    self.is_done = True
            if self._is_caller and self._is_tls_done and not self.is_done:
                self.is_done = self._tls.read(len(_ACCEPTED)) == _ACCEPTED
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            # the alert says why, to the peer
            raise NotAuthentic(explain(error), self._outgoing.read(), REMEDY) from None
        except ValueError as error:
            raise NotAuthentic(f"the peer's certificate {error}", remedy=REMEDY) from None
        return self._outgoing.read()

    def seal(self, data: bytes | bytearray | memoryview) -> bytes:
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]
        return self._outgoing.read()

    def open(self, data: bytes | bytearray | memoryview) -> bytes:
        self._incoming.write(data)
        pieces = []
        try:
            while piece := self._tls.read(_RECORD_NBYTES):
                pieces.append(piece)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise NotAuthentic(explain(error)) from None
        return b"".join(pieces)

    def _meet(self, first: bytes) -> None:
        if self._is_caller:
            if reason := why_to_leave(first, Kind.TLS):
                raise NotAuthentic(reason)
        elif reason := why_to_refuse(first, Kind.TLS):
            raise NotAuthentic(reason, Kind.TLS.value)


class Shields:
    """Makes the shield of each connection of a cluster, of files as they are then. Thread-safe."""

    def __init__(self, security: LinkSecurity | None) -> None:
        """Raises LLMException(LLM_PARAM_INVALID) for files that no link can be made with."""
        self._secret: Renewed[bytes] | None = None
        self._contexts: Renewed[TlsContexts] | None = None
        if security is None:
            return
        if (secret := security.secret) is None:
            files = (security.ca, security.certificate, security.key)
            self._contexts = Renewed(files, lambda: load_tls(security))
        elif file := security.secret_file:
            self._secret = Renewed((file,), lambda: read_secret(file))
        else:
            self._secret = Renewed((), lambda: secret)

    @property
    def is_secure(self) -> bool:
        return self._secret is not None or self._contexts is not None

    def make(self, *, is_caller: bool) -> Shield:
        if self._secret is not None:
            return Secret(self._secret.get(), is_caller=is_caller)
        if self._contexts is not None:
            contexts = self._contexts.get()
            context = contexts.caller if is_caller else contexts.listener
            return Tls(context, is_caller=is_caller)
        return Open()
