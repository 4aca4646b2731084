"""Complaints about what others put into a directory: a few are logged, or it would fill our log."""

from __future__ import annotations

from typing import Final

from llm_datadist.core.words import printable
from llm_datadist.observe.log import get_logger

_MOST: Final = 8


class Complaints:
    """Logs the first few of each watch, each thing once."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._made: set[tuple[str, str]] = set()

    def add(self, what: str, why: str) -> None:
        """This is left out, because of that."""
        if len(self._made) >= _MOST or (what, why) in self._made:
            return
        self._made.add((what, why))
        get_logger().warning(
            "%s has a record that is left out, %s: %s%s",
            self._directory, printable(what), printable(why),
            "; of further ones nothing is said" if len(self._made) == _MOST else "",
        )  # fmt: skip
