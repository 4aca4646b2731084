"""What the commands print on: every terminal, also one that cannot show all characters."""

from __future__ import annotations

import codecs
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

_HANDLER = "llm_datadist.plain"
_PLAIN = {"\N{RIGHTWARDS ARROW}": "->", "\N{HORIZONTAL ELLIPSIS}": "...", "\N{EN DASH}": "-"}


def print_anywhere() -> None:
    """From now on, what stdout and stderr cannot encode is spelt in ASCII.

    One that is closed takes all.
    """
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    codecs.register_error(_HANDLER, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def drop_output() -> None:
    """What is not written yet goes nowhere: the interpreter would try once more as it ends."""
    sys.stdout = _nowhere()


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    odd = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in odd), error.end
