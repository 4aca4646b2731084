"""Somebody in the middle of connections by shared secret, who can read, alter and add frames."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from keyed_wire import ANSWER_NBYTES, GREETING_NBYTES, HEAD_NBYTES, PROOF_NBYTES
from wire import TRAILER, Wire

from llm_datadist.core import messages as m

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

#: what passes before the first frame, by whether it goes to the caller
_HAND_SHAKE = {False: (GREETING_NBYTES, PROOF_NBYTES), True: (ANSWER_NBYTES,)}


@dataclass(frozen=True)
class Frame:
    """One that passes: as it is on the wire, and what it says, for frames are not encrypted."""

    to_caller: bool
    data: bytes
    message: m.AnyMessage


class Middle:
    """Relays TCP to a listener; `alter` says what is passed on in place of a frame.

    A context manager.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.alter: Callable[[Frame], bytes] = lambda frame: frame.data
        #: the same for bytes of caches, with what the owner says behind them
        self.alter_bytes: Callable[[bytes], bytes] = bytes
        #: all frames that passed so far
        self.seen: list[Frame] = []
        self._ends: list[dict[bool, Wire]] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._server.close()
        for ends in self._ends:
            end(ends)
        for thread in self._threads[1:]:
            thread.join()
        for ends in self._ends:
            for wire in ends.values():
                wire.socket.close()

    def token(self) -> bytes:
        """Of the link that was made last: it was in the Welcome."""
        return [frame.message.token for frame in self.seen if isinstance(frame.message, m.Welcome)][
            -1
        ]

    def say_on_control(self, data: bytes, *, to_caller: bool) -> None:
        """Adds bytes to the first connection there was."""
        self._ends[0][to_caller].send_bytes(data)

    def _accept(self) -> None:
        with suppress(OSError):  # it was shut down
            while True:
                caller = Wire(self._server.accept()[0])
                ends = {True: caller, False: Wire.dial(self._target)}
                for wire in ends.values():
                    wire.socket.settimeout(None)
                self._ends.append(ends)
                for to_caller in (True, False):
                    thread = threading.Thread(target=self._relay, args=(ends, to_caller))
                    self._threads.append(thread)
                    thread.start()

    def _relay(self, ends: dict[bool, Wire], to_caller: bool) -> None:
        source, target = ends[not to_caller], ends[to_caller]
        try:
            for nbytes in _HAND_SHAKE[to_caller]:
                target.send_bytes(source.receive_bytes(nbytes))
            while True:
                head = source.receive_bytes(HEAD_NBYTES)
                body = source.receive_bytes(int.from_bytes(head[:4], "little"))
                message = m.decode_frame(body)
                frame = Frame(to_caller, head + body, message)
                self.seen.append(frame)
                target.send_bytes(self.alter(frame))
                if isinstance(message, m.Sending):
                    raw = source.receive_bytes(message.nbytes + TRAILER.size)
                    target.send_bytes(self.alter_bytes(raw))
        except (EOFError, OSError):  # an end that is gone takes the other with it
            end(ends)


def end(ends: dict[bool, Wire]) -> None:
    for wire in ends.values():
        with suppress(OSError):  # it has ended already
            wire.socket.shutdown(socket.SHUT_RDWR)


# -- what can be done to a frame; an earlier one is at hand ----------------------------------------


def flip(at: int) -> Callable[[Frame, bytes], bytes]:
    def alter(frame: Frame, _: bytes) -> bytes:
        data = bytearray(frame.data)
        data[at] ^= 1
        return bytes(data)

    return alter


def unkeyed(frame: Frame) -> bytes:
    """What it says, with a MAC that is none."""
    body = frame.data[HEAD_NBYTES:]
    return len(body).to_bytes(4, "little") + bytes(HEAD_NBYTES - 4) + body


def shortened(frame: Frame, _: bytes) -> bytes:
    nbytes = len(frame.data) - HEAD_NBYTES - 1
    return nbytes.to_bytes(4, "little") + frame.data[4:-1]
