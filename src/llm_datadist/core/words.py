"""The words of others: shown to people, in logs and on terminals, where some characters do things.

A line break forges a line of a log, an escape sequence moves a terminal's cursor or sets its title,
a mark of direction has a text read backwards. What peers say is made harmless once, where it is
decoded; everything behind that may show it as it is.
"""

from __future__ import annotations

from typing import TypeVar, cast

import msgspec

#: longer words are cut: they come in lines and cells of tables
MAX_SHOWN = 1000

T = TypeVar("T")


def printable(text: str) -> str:
    r"""The text as one line of characters that print, MAX_SHOWN of them at most.

    What does not print (controls, line breaks, marks of direction, lone surrogates) is written as
    an escape, `\x1b`; where the text was cut there is an ellipsis. Once more changes nothing.
    """
    shown = escaped(text[:MAX_SHOWN])
    if max(len(text), len(shown)) > MAX_SHOWN:
        shown = f"{shown[: MAX_SHOWN - 1]}…"
    return shown


def escaped(text: str) -> str:
    """The text, with an escape in place of each character that does not print."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def heard(value: T) -> T:
    """A message, or a field of one, with all texts in it printable."""
    return cast("T", _heard(value))


def _heard(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, tuple):
        return tuple(map(_heard, value))
    if isinstance(value, msgspec.Struct):
        return type(value)(*(_heard(getattr(value, name)) for name in value.__struct_fields__))
    return value


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
