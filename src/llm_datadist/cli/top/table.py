"""Tables that leave out what matters least where the terminal is too narrow for all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

_GAP = 2


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and how long its column stays: the highest rank is the first to go."""

    name: str
    rank: int
    is_number: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """One cell for each column."""

    cells: Sequence[str]
    style: str = ""


class FittedTable:
    """A table as wide as the console at most. Whole columns are left out, and never rows."""

    def __init__(self, title: str, columns: Sequence[Column], rows: Sequence[Row]) -> None:
        self._title, self._columns, self._rows = title, columns, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        kept = self._kept(options.max_width)
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="underline")
        for index in kept:
            column = self._columns[index]
            justify = "right" if column.is_number else "left"
            table.add_column(column.name, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
        for row in self._rows:
            table.add_row(*(plain(row.cells[index]) for index in kept), style=row.style)
        yield Text(self._title, "bold")
        yield table

    def _kept(self, width: int) -> list[int]:
        """The columns that fit, in their order."""
        widths = [
            max(cell_len(text) for text in (column.name, *(row.cells[index] for row in self._rows)))
            for index, column in enumerate(self._columns)
        ]
        kept = sorted(range(len(widths)), key=lambda index: self._columns[index].rank)
        while len(kept) > 1 and sum(widths[index] + _GAP for index in kept) > width + _GAP:
            kept.pop()
        return sorted(kept)


def plain(words: str) -> Text:
    """Words of others on our terminal: no markup, no escape sequences."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words))
