"""The lines in an HTTP answer that comes in chunks, taken apart as its bytes come."""

from __future__ import annotations

from typing import Final

#: a line, and a head: an event of etcd's with as many records as fit into one of its answers
_MAX_NBYTES: Final = 8 * 1024 * 1024
_MAX_HEAD_NBYTES: Final = 64 * 1024


class Chunks:
    """Bytes go in, lines come out. Raises ValueError for what is no such answer."""

    def __init__(self) -> None:
        self._raw = bytearray()
        self._body = bytearray()
        self._has_head = False
        self._left = 0  #: bytes of the chunk that are still to come, its line end included

    def add(self, data: bytes) -> list[bytes]:
        """The lines that are complete now."""
        self._raw += data
        if not self._has_head and not self._take_head():
            return []
        while self._take_chunk():
            pass
        *lines, rest = self._body.split(b"\n")
        self._body = rest
        if len(rest) > _MAX_NBYTES:
            raise ValueError("a line of the answer has no end")
        return [bytes(line) for line in lines if line.strip()]

    def _take_head(self) -> bool:
        head, end, rest = self._raw.partition(b"\r\n\r\n")
        if not end:
            if len(head) > _MAX_HEAD_NBYTES:
                raise ValueError("the head of the answer has no end")
            return False
        status, *fields = bytes(head).lower().split(b"\r\n")
        if status.split()[1:2] != [b"200"]:
            raise ValueError(f"the answer is {status.decode(errors='replace')}")
        if not any(field.split() == [b"transfer-encoding:", b"chunked"] for field in fields):
            raise ValueError("the answer does not come in chunks")
        self._raw = rest
        self._has_head = True
        return True

    def _take_chunk(self) -> bool:
        """A part of a chunk, or the line in front of it; False when more must come first."""
        if self._left:
            part = self._raw[: self._left]
            del self._raw[: len(part)]
            self._body += part[: max(0, self._left - 2)]
            self._left -= len(part)
            return not self._left and bool(self._raw)
        line, end, rest = self._raw.partition(b"\r\n")
        if not end:
            if len(line) > _MAX_HEAD_NBYTES:
                raise ValueError("a chunk's length has no end")
            return False
        nbytes = int(line.partition(b";")[0], 16)
        if not 0 < nbytes <= _MAX_NBYTES:
            raise ValueError("the answer has ended")
        self._raw, self._left = rest, nbytes + 2
        return bool(self._raw)
