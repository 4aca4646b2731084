"""Frames out of a byte stream that arrives in any pieces; bytes in, messages out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.core import messages as m

if TYPE_CHECKING:
    from collections.abc import Iterator


class FrameReader:
    """Assembles messages. Buffers no more than one frame's cap and what came with it."""

    def __init__(self, max_nbytes: int = m.MAX_GREETING_NBYTES) -> None:
        #: the largest body accepted; raised once the peer is known
        self.max_nbytes = max_nbytes
        self._buffer = bytearray()

    @property
    def is_empty(self) -> bool:
        return not self._buffer

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def __iter__(self) -> Iterator[m.AnyMessage]:
        """The messages that are complete. Raises ProtocolError."""
        while len(self._buffer) >= m.HEADER.size:
            end = m.HEADER.size + m.body_nbytes(self._buffer[: m.HEADER.size], self.max_nbytes)
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[m.HEADER.size : end])
            del self._buffer[:end]
            yield m.decode(body)
