"""The base of the interface's integer enums."""

from __future__ import annotations

from enum import IntEnum


class NamedIntEnum(IntEnum):
    """An IntEnum that prints as `Class.MEMBER`.

    Python's own answer changed in 3.11, and programs compare and log the text. A format
    specification such as `:#x` still formats the number.
    """

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __format__(self, spec: str) -> str:
        return int.__format__(self, spec) if spec else str(self)
