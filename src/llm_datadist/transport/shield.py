"""Shields: what stands between a connection's bytes and the network. No sockets in here.

A shield first proves to each end who the other is; only then does anything of a link pass. Mutual
TLS goes on to seal all bytes. A shared secret only opens the connection: it keeps strangers out,
but not somebody who can change what is on the wire.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import ssl
from typing import TYPE_CHECKING, Final, Protocol

from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from llm_datadist.link_security import LinkSecurity

_NONCE_NBYTES: Final = 32
_MAC_NBYTES: Final = 32
_GREETING: Final = b"LDSECRT1"
#: the listener's word that it accepts the caller's certificate: TLS 1.3 does not wait for that
_ACCEPTED: Final = b"\x01"
#: what TLS seals at a time, and gives back at most
_RECORD_NBYTES: Final = 16 * 1024


class NotAuthentic(Exception):
    """The other end did not prove that it may link."""


class Shield(Protocol):
    """One connection's. Used by one thread at a time."""

    #: the hand-shake is over
    is_done: bool
    #: bytes pass as they are from then on
    is_transparent: bool

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


class Open:
    """No security: everybody is let in."""

    is_done = True
    is_transparent = True

    def start(self) -> bytes:
        return b""

    def answer(self, data: bytes) -> bytes:
        return b""

    def seal(self, data: bytes | bytearray | memoryview) -> bytes:
        return bytes(data)

    def open(self, data: bytes | bytearray | memoryview) -> bytes:
        return bytes(data)


class Secret(Open):
    """Both ends answer the other's challenge with a MAC that only the secret makes."""

    def __init__(self, secret: bytes, *, is_caller: bool) -> None:
        self.is_done = False
        self._secret = secret
        self._is_caller = is_caller
        self._mine = secrets.token_bytes(_NONCE_NBYTES)
        self._nonces = b""
        self._came = b""

    def start(self) -> bytes:
        return _GREETING + self._mine if self._is_caller else b""

    def answer(self, data: bytes) -> bytes:
        self._came += data
        if self._is_caller:
            return self._answer_listener()
        return self._answer_caller()

    def open(self, data: bytes | bytearray | memoryview) -> bytes:
        came, self._came = self._came, b""
        return came + data

    def _answer_listener(self) -> bytes:
        if len(self._came) < _NONCE_NBYTES + _MAC_NBYTES:
            return b""
        self._nonces = self._mine + self._take(_NONCE_NBYTES)
        self._check(self._take(_MAC_NBYTES), b"listener")
        self.is_done = True
        return self._mac(b"caller")

    def _answer_caller(self) -> bytes:
        if not self._nonces:
            if not _GREETING.startswith(self._came[: len(_GREETING)]):
                raise NotAuthentic("it does not begin with the hand-shake of a shared secret")
            if len(self._came) < len(_GREETING) + _NONCE_NBYTES:
                return b""
            self._take(len(_GREETING))
            self._nonces = self._take(_NONCE_NBYTES) + self._mine
            return self._mine + self._mac(b"listener")
        if len(self._came) >= _MAC_NBYTES:
            self._check(self._take(_MAC_NBYTES), b"caller")
            self.is_done = True
        return b""

    def _take(self, count: int) -> bytes:
        taken, self._came = self._came[:count], self._came[count:]
        return taken

    def _mac(self, who: bytes) -> bytes:
        return hmac.new(self._secret, who + self._nonces, hashlib.sha256).digest()

    def _check(self, mac: bytes, who: bytes) -> None:
        if not hmac.compare_digest(mac, self._mac(who)):
            raise NotAuthentic("it does not know the shared secret")


class Tls(Open):
    """Mutual TLS 1.3: each end has a certificate of one authority, and all bytes are sealed."""

    is_transparent = False

    def __init__(self, context: ssl.SSLContext, *, is_caller: bool) -> None:
        self.is_done = False
        self._is_caller = is_caller
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=not is_caller)
        self._is_tls_done = False

    def start(self) -> bytes:
        return self.answer(b"") if self._is_caller else b""

    def answer(self, data: bytes) -> bytes:
        self._incoming.write(data)
        try:
            if not self._is_tls_done:
                self._tls.do_handshake()
                self._is_tls_done = True
                if not self._is_caller:
                    self._tls.write(_ACCEPTED)
                    self.is_done = True
            if self._is_caller and self._is_tls_done and not self.is_done:
                self.is_done = self._tls.read(len(_ACCEPTED)) == _ACCEPTED
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise NotAuthentic(_explain(error)) from None
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
            raise NotAuthentic(_explain(error)) from None
        return b"".join(pieces)


class Shields:
    """Makes the shield of each connection of a cluster. Thread-safe."""

    def __init__(self, security: LinkSecurity | None) -> None:
        """Raises LLMException(LLM_PARAM_INVALID) for files that are no certificates or keys."""
        self._security = security
        self._contexts: dict[bool, ssl.SSLContext] = {}
        if security is not None and security.secret is None:
            self._contexts = {end: tls_context(security, is_caller=end) for end in (True, False)}

    @property
    def is_secure(self) -> bool:
        return self._security is not None

    def make(self, *, is_caller: bool) -> Shield:
        if self._security is None:
            return Open()
        if self._security.secret is not None:
            return Secret(self._security.secret, is_caller=is_caller)
        return Tls(self._contexts[is_caller], is_caller=is_caller)


def tls_context(security: LinkSecurity, *, is_caller: bool) -> ssl.SSLContext:
    """Of one end of mutual TLS. Raises LLMException(LLM_PARAM_INVALID)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if is_caller else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the authority says who is a cluster; clusters move
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(security.ca)
        context.load_cert_chain(security.certificate, security.key)
    except (ssl.SSLError, OSError) as error:
        raise invalid(f"link_security: the certificate, its key or the CA: {error}") from None
    return context


def _explain(error: ssl.SSLError) -> str:
    return f"TLS: {error.reason or error}"
