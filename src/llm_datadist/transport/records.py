"""Records: what the bytes of a connection are sealed in once TLS has met, where both ends can.

TLS's own records have 16 KiB at most, and Python's `ssl` copies each byte twice more. So where both
ends have the package cryptography they take the hand-shake of TLS, and records of their own behind
it: a length, then up to RECORD_NBYTES encrypted by AES-128-OCB3 (RFC 7253). Why that is as safe as
what TLS 1.3 does:

- *Agreement.* Both ends say in TLS's hand-shake that they can (ALPN), and what was said there is
  part of what each proves to the other: nobody in between can talk them out of it, or into it.
- *Keys.* Each end sends 32 random bytes inside the TLS session. HMACs of both make the two secrets
  of the connection, one for each direction, and those the keys. So a key seals what one end sends
  on one connection, nobody else knows it, and it is lost with the session, as TLS's own are.
- *Nonces.* The number of the record in its direction. It is counted up before it is used, whatever
  happens then, and never goes back; so no nonce is used twice under a key. (A forked child has none
  of the connections: `running/forks.py`.)
- *Place.* A record opens as the next one of its direction and connection, and as nothing else: not
  when it is changed, repeated, swapped, left out, sent back or of another connection. Its length is
  authenticated with it. The first that does not open ends the connection, and nothing of it is
  given to anybody.
- *Ends.* A connection that is cut is noticed as without TLS: by whoever knows how much must come.
- *Limits.* Behind RENEWED_AFTER records the secret is replaced by an HMAC of itself, and with it
  the key: each seals at most s = 2**29 blocks of 16 bytes, for which 6 s**2 / 2**128 is 2**-67.

Rejected: AES-GCM, TLS's usual cipher (4.0 GB/s where OCB3 has 7.3 and 6.0, on a core here: it was
half of what a transfer took); ChaCha20-Poly1305 (2.1); keys by TLS's exporter (RFC 5705), which
Python's `ssl` does not have; bulk data alone in such records and frames in TLS's (two counters, and
a border between them to be argued).
"""

from __future__ import annotations

import hmac
import struct
from typing import TYPE_CHECKING, Final, TypeAlias

from llm_datadist.core.messages import HEADER
from llm_datadist.transport.shield import NotAuthentic

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from cryptography.hazmat.primitives.ciphers.aead import AESOCB3

    Buffer: TypeAlias = npt.NDArray[np.uint8]

#: by which ends of TLS agree on these records (ALPN)
PROTOCOL: Final = "llm-datadist-aes128ocb-1"
#: what each end adds to the keys
PART_NBYTES: Final = 32
#: of plain bytes in a record: with less, what Python does for each counts; with more, what was
#: received has left the processor's cache when it is opened
RECORD_NBYTES: Final = 256 * 1024
#: what is said of what does not open
ALTERED: Final = "a record is not the peer's next one: somebody is in between"
#: so many records are sealed under one key
RENEWED_AFTER: Final = 2**15

_HEAD: Final = struct.Struct("<I")
HEAD_NBYTES: Final = _HEAD.size
TAG_NBYTES: Final = 16
#: what a record takes on the wire beside what is in it
OVERHEAD_NBYTES: Final = HEAD_NBYTES + TAG_NBYTES
_NONCE: Final = struct.Struct("<4xQ")
_KEY_NBYTES: Final = 16


def why_not() -> str:
    """Why this end cannot have such records; empty where it can."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.ciphers.aead import AESOCB3
    except ImportError as error:
        return f"the package cryptography is missing, or cannot be imported ({error})"
    if not hasattr(AESOCB3, "decrypt_into"):
        return "the package cryptography is too old"
    try:
        AESOCB3(bytes(_KEY_NBYTES))
    except UnsupportedAlgorithm as error:
        return f"the package cryptography is not allowed AES-OCB3 ({error})"
    return ""


class Records:
    """Seals what one end of a connection sends, and opens what comes to it.

    Used by one thread at a time, or by one for each direction.
    """

    def __init__(self, callers_part: bytes, listeners_part: bytes, *, is_caller: bool) -> None:
        """Both parts have PART_NBYTES, are random, and known to the two ends alone."""
        both = callers_part + listeners_part
        callers, listeners = (_Direction(_derived(both, who)) for who in ("caller", "listener"))
        self._out, self._in = (callers, listeners) if is_caller else (listeners, callers)
        self._came = bytearray()

    def seal(self, data: bytes | bytearray | memoryview) -> bytes:
        """Data of any length as records."""
        view = memoryview(data)
        records: list[bytes] = []
        while view:
            piece, view = view[:RECORD_NBYTES], view[RECORD_NBYTES:]
            head = _HEAD.pack(len(piece) + TAG_NBYTES)
            aead, nonce = self._out.next()
            records += (head, aead.encrypt(nonce, piece, head))
        return b"".join(records)

    def seal_into(self, plain: Buffer, sealed: Buffer) -> memoryview:
        """At most RECORD_NBYTES as one record, in a buffer with room for it."""
        end = len(plain) + OVERHEAD_NBYTES
        view = sealed.data[:end]
        _HEAD.pack_into(view, 0, end - HEAD_NBYTES)
        aead, nonce = self._out.next()
        aead.encrypt_into(nonce, plain.data, bytes(view[:HEAD_NBYTES]), view[HEAD_NBYTES:])
        return view

    def body_nbytes(self, head: bytes | bytearray, max_nbytes: int = RECORD_NBYTES) -> int:
        """How much follows the head of a record. Raises NotAuthentic."""
        nbytes: int = _HEAD.unpack(head)[0]
        if not TAG_NBYTES < nbytes <= min(max_nbytes, RECORD_NBYTES) + TAG_NBYTES:
            raise NotAuthentic("it sent what is no record")
        return nbytes

    def open_into(self, head: bytes | bytearray, body: memoryview, plain: Buffer) -> memoryview:
        """What is in the next record, in a buffer with room for it. Raises NotAuthentic.

        Then the buffer holds bytes that are nobody's: they are not to be looked at.
        """
        opened = plain.data[: len(body) - TAG_NBYTES]
        aead, nonce = self._in.next()
        try:
            aead.decrypt_into(nonce, body, head, opened)
        except _invalid_tag() as error:
            raise _altered() from error
        return opened

    def open(self, data: bytes | bytearray | memoryview, max_nbytes: int) -> bytes:
        """What is in the records that are whole with this data. Raises NotAuthentic.

        None has more than a frame with a body of `max_nbytes`.
        """
        self._came += data
        pieces = []
        while len(self._came) >= HEAD_NBYTES:
            head = bytes(self._came[:HEAD_NBYTES])
            end = HEAD_NBYTES + self.body_nbytes(head, HEADER.size + max_nbytes)
            if len(self._came) < end:
                break
            pieces.append(self._open_one(head, bytes(self._came[HEAD_NBYTES:end])))
            del self._came[:end]
        return b"".join(pieces)

    def _open_one(self, head: bytes, body: bytes) -> bytes:
        aead, nonce = self._in.next()
        try:
            return aead.decrypt(nonce, body, head)
        except _invalid_tag() as error:
            raise _altered() from error


class _Direction:
    """The key of one direction, and the number of its next record."""

    __slots__ = ("_aead", "_number", "_secret")

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._aead = _aead(secret)
        self._number = 0

    def next(self) -> tuple[AESOCB3, bytes]:
        """The cipher for the next record, and its nonce: for one use."""
        number = self._number
        if number and not number % RENEWED_AFTER:
            self._secret = _derived(self._secret, "next")
            self._aead = _aead(self._secret)
        self._number = number + 1
        return self._aead, _NONCE.pack(number)


def _derived(secret: bytes, what: str) -> bytes:
    return hmac.digest(secret, f"{PROTOCOL} {what}".encode(), "sha256")


def _aead(secret: bytes) -> AESOCB3:
    from cryptography.hazmat.primitives.ciphers.aead import AESOCB3  # an extra, slow to import

    return AESOCB3(_derived(secret, "key")[:_KEY_NBYTES])


def _invalid_tag() -> type[Exception]:
    from cryptography.exceptions import InvalidTag

    return InvalidTag


def _altered() -> NotAuthentic:
    return NotAuthentic(ALTERED)
