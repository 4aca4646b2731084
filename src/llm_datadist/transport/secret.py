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
#: so short a frame, as nearly all answers are, is likely to be sent again
_SHORT_NBYTES: Final = 32


class _Tags:
    """The MACs of the frames of one direction, one after the other.

    BLAKE2 in its keyed mode takes a third of HMAC's time on small frames.
    """

    __slots__ = ("_begun", "_key", "_number")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0
        self._begun: blake2b | None = None

    def begin(self) -> blake2b:
        """What of the next MAC can be made before its frame is there. May be called again."""
        if self._begun is None:
            number = _COUNT.pack(self._number)
            self._begun = blake2b(number, digest_size=_TAG_NBYTES, key=self._key)
        return self._begun

    def tag(self, frame: bytes | bytearray | memoryview) -> bytes:
        """The next MAC."""
        tag = self.begin()
        self.skip()
        tag.update(frame)
        return tag.digest()

    def ahead(self, frame: bytes) -> bytes:
        """The next MAC if that is the next frame, and still the next one behind this."""
        tag = self.begin().copy()
        tag.update(frame)
        return tag.digest()

    def skip(self) -> None:
        """The next MAC was made ahead, and is used."""
        self._begun, self._number = None, self._number + 1


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
        #: of what is sent, and of what comes
        self._sent, self._opened = _Tags(b""), _Tags(b"")
        #: the last frame that was sent if it is short, and what to send if it is the next one, too
        self._last = self._again = b""

    def start(self) -> bytes:
        return _GREETING + self._mine if self._is_caller else b""

    def answer(self, data: bytes) -> bytes:
        self._came += data
        if self._is_caller:
            return self._answer_listener()
        return self._answer_caller()

    def seal(self, data: bytes | bytearray | memoryview) -> bytes:
        if self._again and data == self._last:
            self._sent.skip()
            keyed, self._again = self._again, b""
            return keyed
        self._last, self._again = bytes(data) if len(data) <= _SHORT_NBYTES else b"", b""
        return _KEYED.pack(len(data), self._sent.tag(data)) + data

    def rest(self) -> None:
        self._opened.begin()
        if self._last:
            self._again = _KEYED.pack(len(self._last), self._sent.ahead(self._last)) + self._last
        else:
            self._sent.begin()

    def foreseen(self, frame: bytes) -> bytes:
        """What comes if that is the peer's next frame."""
        return _KEYED.pack(len(frame), self._opened.ahead(frame)) + frame

    def is_foreseen(self, keyed: bytearray, foreseen: bytes) -> bool:
        """Whether that is what has come; if so, the peer's next frame is the one behind it."""
        is_foreseen = hmac.compare_digest(keyed, foreseen)
        if is_foreseen:
            self._opened.skip()
        return is_foreseen

    def open(
        self, data: bytes | bytearray | memoryview, max_nbytes: int = MAX_REQUEST_BODY_NBYTES
    ) -> bytes:
        if not self._came and len(data) >= KEYED_HEAD_NBYTES:
            end = KEYED_HEAD_NBYTES + self.frame_nbytes(data, max_nbytes)
            if len(data) == end:  # one frame, as nearly always
                return bytes(self.open_frame(data))
        self._came += data
        frames = []
        while len(self._came) >= KEYED_HEAD_NBYTES:
            end = KEYED_HEAD_NBYTES + self.frame_nbytes(self._came, max_nbytes)
            if len(self._came) < end:
                break
            frames.append(self.open_frame(self._take(end)))
        return b"".join(frames)

    def frame_nbytes(
        self, head: bytes | bytearray | memoryview, max_nbytes: int = MAX_REQUEST_BODY_NBYTES
    ) -> int:
        """How long the frame behind its head is. Raises NotAuthentic."""
        nbytes: int = _KEYED.unpack_from(head)[0]
        if nbytes > HEADER.size + max_nbytes:
            raise NotAuthentic("it sent what is no keyed frame")
        return nbytes

    def open_frame(self, keyed: bytes | bytearray | memoryview) -> memoryview:
        """The frame of a whole keyed one, if that is the peer's next. Raises NotAuthentic."""
        _, tag = _KEYED.unpack_from(keyed)
        frame = memoryview(keyed)[KEYED_HEAD_NBYTES:]
        if not hmac.compare_digest(tag, self._opened.tag(frame)):
            raise NotAuthentic("a frame is not the peer's next one: somebody is in between")
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
        mine, theirs = (callers, listeners) if self._is_caller else (listeners, callers)
        self._sent, self._opened = _Tags(mine), _Tags(theirs)
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
