"""Mutual TLS: each end has a certificate of one authority, and all bytes are sealed."""

from __future__ import annotations

import secrets
import ssl
from typing import Final

from llm_datadist.core.messages import MAX_REQUEST_BODY_NBYTES
from llm_datadist.transport import ktls
from llm_datadist.transport.beginnings import Kind, why_to_leave, why_to_refuse
from llm_datadist.transport.certificate import REMEDY, Certificate, NamesNoCluster, explain
from llm_datadist.transport.records import PART_NBYTES, PROTOCOL, Records
from llm_datadist.transport.shield import NotAuthentic, Open

#: the listener's word that it accepts the caller's certificate: TLS 1.3 does not wait for that
_ACCEPTED: Final = b"\x01"
#: what TLS seals at a time, and gives back at most
_RECORD_NBYTES: Final = 16 * 1024


class Tls(Open):
    """Mutual TLS 1.3: each end has a certificate of one authority, and all bytes are sealed.

    Behind the hand-shake by the kernel (`ktls.py`) or in larger records (`records.py`), where both
    ends can; else by TLS itself.
    """

    def __init__(self, context: ssl.SSLContext, *, is_caller: bool) -> None:
        self.seals_all = True
        self.encryption = "tls"
        self.is_done = False
        self._is_caller = is_caller
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=not is_caller)
        self._is_tls_done = False
        #: what seals behind the hand-shake; None: TLS itself does
        self.records: Records | None = None
        #: what this end adds to the keys of either; empty where there are none
        self._part = b""
        #: what the peer has said within TLS of the hand-shake
        self._heard = b""

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
                self._begin()
            self._finish()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            # the alert says why, to the peer
            raise NotAuthentic(explain(error), self._outgoing.read(), REMEDY) from None
        except NamesNoCluster as error:
            raise NotAuthentic(f"the peer's certificate {error}", remedy=REMEDY) from None
        return self._outgoing.read()

    def seal(self, data: bytes | bytearray | memoryview) -> bytes:
        if self.kernels is not None:
            return bytes(data)
        if self.records is not None:
            return self.records.seal(data)
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]
        return self._outgoing.read()

    def open(
        self, data: bytes | bytearray | memoryview, max_nbytes: int = MAX_REQUEST_BODY_NBYTES
    ) -> bytes:
        if self.kernels is not None:
            return bytes(data)
        if self.records is not None:
            return self.records.open(data, max_nbytes)
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

    def _begin(self) -> None:
        """TLS has met. Raises NamesNoCluster."""
        self.peer_certificate = Certificate.of_peer(self._tls)
        if self._tls.selected_alpn_protocol() in (PROTOCOL, ktls.PROTOCOL):
            self._part = secrets.token_bytes(PART_NBYTES)
        if self._is_caller and self._part:
            self._tls.write(self._part)

    def _finish(self) -> None:
        """The rest of the hand-shake, within TLS. Raises NotAuthentic, SSLWantReadError."""
        word = _ACCEPTED if self._is_caller else b""
        while missing := len(word) + len(self._part) - len(self._heard):
            if not (heard := self._tls.read(missing)):
                raise NotAuthentic("it ended TLS in the hand-shake")
            self._heard += heard
        if not self._heard.startswith(word):
            raise NotAuthentic("it said something else than that it accepts the certificate")
        if not self._is_caller:
            self._tls.write(_ACCEPTED + self._part)
        if self._part:
            if self._incoming.pending or self._tls.pending():
                raise NotAuthentic("it spoke before the hand-shake had ended")
            ours, theirs = self._part, self._heard[len(word) :]
            parts = (ours, theirs) if self._is_caller else (theirs, ours)
            self._take(*parts)
            self._part = self._heard = b""
        self.is_done = True

    def _take(self, callers_part: bytes, listeners_part: bytes) -> None:
        """What seals from here on, as was agreed."""
        parts, is_caller = (callers_part, listeners_part), self._is_caller
        if self._tls.selected_alpn_protocol() == ktls.PROTOCOL:
            self.kernels = ktls.keys_of(*parts, is_caller=is_caller)
            self.seals_all, self.encryption = False, ktls.ENCRYPTION
            self.most_nbytes = ktls.MOST_NBYTES
        else:
            self.records = Records(*parts, is_caller=is_caller)
            self.encryption = "tls-records"

    def _meet(self, first: bytes) -> None:
        if self._is_caller:
            if reason := why_to_leave(first, Kind.TLS):
                raise NotAuthentic(reason)
        elif reason := why_to_refuse(first, Kind.TLS):
            raise NotAuthentic(reason, Kind.TLS.value)
