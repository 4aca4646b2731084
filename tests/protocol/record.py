"""Frames of each protocol version as its releases write them, kept in `released/`.

    python tests/protocol/record.py           records the frames of a new PROTOCOL_VERSION
    python tests/protocol/record.py --again   replaces those of a version that no release speaks yet

RELEASING.md says what may change on the wire, and when. `test_released_frames.py` compares.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from samples import samples

from llm_datadist.core import messages as m

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).with_name("released")
#: what may have more fields in a later release of the same protocol: readers skip those
MAY_GROW = ("Hello", "Stats")

_HINT = (
    "Clusters of protocol {version} would no longer understand each other. Raise PROTOCOL_VERSION "
    "in core/messages.py, then run `python tests/protocol/record.py` (RELEASING.md, The wire); "
    "if no release speaks protocol {version} yet, add `--again` and let the version be."
)


@dataclass(frozen=True)
class Recorded:
    """A frame, and what it says: the type of the message and its fields."""

    message: str
    says: dict[str, Any]
    frame: str  #: in hexadecimal digits

    @property
    def body(self) -> bytes:
        return bytes.fromhex(self.frame)[m.HEADER.size :]


def file_of(version: int) -> Path:
    return FOLDER / f"protocol-{version}.json"


def recorded(version: int) -> list[Recorded]:
    """The frames of a protocol version; raises FileNotFoundError when there are none."""
    frames = json.loads(file_of(version).read_text())["frames"]
    return [Recorded(**frame) for frame in frames]


def recorded_now() -> list[Recorded]:
    """The frames that this source writes."""
    return [
        Recorded(type(message).__name__, _plain(message), m.encode(message).hex())
        for message in samples()
    ]


def difference(old: Recorded, decode: Callable[[bytes], m.Message] = m.decode) -> str | None:
    """How today's reading and writing of a frame differ from when it was recorded, if they do."""
    try:
        message = decode(old.body)
    except m.ProtocolError as error:
        return f"{old.message} is no longer understood: {error}"
    now = {"message": type(message).__name__, **_plain(message)}
    if not _holds(now, {"message": old.message, **old.says}):
        return f"{old.message} is understood as {now}, it said {old.says}"
    frame = _frame_of(message)
    if frame.hex() != old.frame and not (old.message in MAY_GROW and _grew(frame, old)):
        return f"{old.message} is written as {frame.hex()}, it was {old.frame}"
    return None


def what_to_do(version: int) -> str:
    """About a difference, for who made it."""
    return _HINT.format(version=version)


def _frame_of(message: m.Message) -> bytes:
    """As `encode` makes it, also of a type that is not of this protocol."""
    body = msgspec.msgpack.encode(message)
    return m.HEADER.pack(m.MAGIC, len(body)) + body


def _grew(frame: bytes, old: Recorded) -> bool:
    """Whether a frame says all that the old one did: a Hello first of all, Stats in its maps."""
    now, was = (msgspec.msgpack.decode(body) for body in (frame[m.HEADER.size :], old.body))
    return _holds(now[: len(was)] if old.message == "Hello" else now, was)


def _holds(now: Any, was: Any) -> bool:
    """Whether all that was there still is; a dict may have got more keys."""
    if isinstance(was, dict) and isinstance(now, dict):
        return all(name in now and _holds(now[name], value) for name, value in was.items())
    if isinstance(was, list) and isinstance(now, list):
        return len(now) == len(was) and all(map(_holds, now, was))
    return bool(now == was)


def _plain(value: Any) -> Any:
    """As JSON has it; bytes in hexadecimal digits."""
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return f"0x{value.hex()}" if isinstance(value, bytes) else value


def main(arguments: list[str]) -> str | None:
    """Writes the file of today's version; returns why not, if it does not."""
    version, frames = m.PROTOCOL_VERSION, recorded_now()
    file = file_of(version)
    if file.exists() and arguments != ["--again"]:
        was, now = ([each.frame for each in some] for some in (recorded(version), frames))
        if was != now:  # else fields have other names in Python, which nobody sees on the wire
            return f"{file.name} has other frames. {what_to_do(version)}"
    lines = ",\n".join(
        json.dumps(vars(frame)).replace(', "frame":', ',\n  "frame":') for frame in frames
    )
    file.write_text(f'{{"frames": [\n{lines}\n]}}\n')
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
