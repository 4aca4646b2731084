"""The shared secret: it opens a connection, and keys the session on it.

Every frame behind the hand-shake carries a MAC under a key that only the two ends have, over its
direction and its number, so that nothing can be injected, replayed, reordered, left out or
reflected, and whoever merely passed the hand-shake on has nothing to say. The bytes of caches pass
as they are.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from llm_datadist.core.messages import HEADER, MAX_REQUEST_BODY_NBYTES
from llm_datadist.transport.beginnings import Kind, why_to_leave, why_to_refuse
from llm_datadist.transport.shield import NotAuthentic, Open

if TYPE_CHECKING:
    from llm_datadist.transport.shield import Shield

_NONCE_NBYTES: Final = 32
_MAC_NBYTES: Final = 32
_GREETING: Final = b"LDSECRT1"
_TAG_NBYTES: Final = 16
#: what stands in front of a keyed frame: its length and its MAC
_KEYED: Final = struct.Struct(f"<I{_TAG_NBYTES}s")
KEYED_HEAD_NBYTES: Final = _KEYED.size
_COUNT: Final = struct.Struct("<Q")


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

    def open(
        self, data: bytes | bytearray | memoryview, max_nbytes: int = MAX_REQUEST_BODY_NBYTES
    ) -> bytes:
        self._came += data
        frames = []
        while len(self._came) >= KEYED_HEAD_NBYTES:
            end = KEYED_HEAD_NBYTES + self.frame_nbytes(self._came, max_nbytes)
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
