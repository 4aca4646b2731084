"""Somebody in the middle of connections under TLS: who sees records pass, and not what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from middle import Middle, end

from llm_datadist.transport.records import HEAD_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from wire import Wire

#: of TLS's own records: kind, version, length (big-endian)
_TLS_HEAD_NBYTES = 5
#: what a record of ours has there only if it is longer than any in that direction
_VERSIONS = {True: (b"\x03\x03",), False: (b"\x03\x03", b"\x03\x01")}


class RecordMiddle(Middle):
    """`alter_record` says what is passed on in place of a record that the listener sends.

    None ends the connection.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.alter_record: Callable[[bytes], bytes | None] = lambda record: record

    def _relay(self, ends: dict[bool, Wire], to_caller: bool) -> None:
        source, target = ends[not to_caller], ends[to_caller]
        try:
            while True:
                head = source.receive_bytes(HEAD_NBYTES)
                if head[1:3] in _VERSIONS[to_caller]:
                    rest = source.receive_bytes(_TLS_HEAD_NBYTES - HEAD_NBYTES)
                    nbytes = int.from_bytes(head[3:] + rest, "big")
                    target.send_bytes(head + rest + source.receive_bytes(nbytes))
                    continue
                record = head + source.receive_bytes(int.from_bytes(head, "little"))
                altered = self.alter_record(record) if to_caller else record
                if altered is None:
                    raise EOFError
                target.send_bytes(altered)
        except (EOFError, OSError):  # an end that is gone takes the other with it
            end(ends)
