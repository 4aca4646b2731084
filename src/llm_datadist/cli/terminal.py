"""What the commands print on: every terminal, also one that cannot show all characters."""

from __future__ import annotations

import codecs
import sys
from io import TextIOWrapper

_HANDLER = "llm_datadist.plain"
_PLAIN = {"\N{RIGHTWARDS ARROW}": "->", "\N{HORIZONTAL ELLIPSIS}": "...", "\N{EN DASH}": "-"}


def print_anywhere() -> None:
    """From now on, what stdout and stderr cannot encode is spelt in ASCII."""
    codecs.register_error(_HANDLER, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    odd = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in odd), error.end
