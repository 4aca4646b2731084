"""The live screen: two tables that scroll between a line on top and the keys below."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.segment import Segment
from rich.text import Text

from llm_datadist.cli.top.order import Order
from llm_datadist.cli.top.view import view

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

    from llm_datadist.cli.top.samples import Sample
    from llm_datadist.core.stats import ClusterStats
    from llm_datadist.endpoint import Endpoint

#: the line on top, and that of the keys
_FIXED_LINES = 2
_KEYS = "q quit  s sort  r reverse  j k scroll  space pause"
_SEQUENCES = {
    "\x1b[A": "k", "\x1b[B": "j", "\x1bOA": "k", "\x1bOB": "j", "\x1b[5~": "b", "\x1b[6~": "f",
    "\x1b[H": "g", "\x1b[F": "G", "\x1b[1~": "g", "\x1b[4~": "G", "\x1bOH": "g", "\x1bOF": "G",
}  # fmt: skip


@dataclass
class Screen:
    """What is shown, and from where on. `press` is told keys; rich draws it."""

    samples: Sequence[Sample] = ()
    before: Mapping[Endpoint, ClusterStats] = field(default_factory=dict)
    order: Order = Order.SPEED
    is_reversed: bool = False
    is_paused: bool = False
    is_over: bool = False
    _first: int = 0  #: line of the tables that is on top
    _page: int = 1  #: lines of the tables that there was room for

    def show(self, samples: Sequence[Sample]) -> None:
        """What the clusters say now; nothing while it is paused."""
        if not self.is_paused:
            known = {each.endpoint: each.stats for each in self.samples}
            self.before = {at: stats for at, stats in known.items() if stats is not None}
            self.samples = samples

    def press(self, typed: str) -> None:
        """Keys, one or several, as a terminal sends them."""
        for sequence, key in _SEQUENCES.items():
            typed = typed.replace(sequence, key)
        for key in typed:
            self._press(key)

    def _press(self, key: str) -> None:
        if key in "qQ":
            self.is_over = True
        elif key == "s":
            self.order, self._first = self.order.next(), 0
        elif key == "r":
            self.is_reversed = not self.is_reversed
        elif key in " p":
            self.is_paused = not self.is_paused
        elif key in "jkfbgG":
            steps = {"j": 1, "k": -1, "f": self._page, "b": -self._page, "g": -self._first}
            self._first = max(0, self._first + steps.get(key, 10**6))  # the end: see below

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        body = view(self.samples, self.before, self.order, is_reversed=self.is_reversed)
        lines = console.render_lines(body, options.update(height=None))
        self._page = max(1, options.size.height - _FIXED_LINES)
        self._first = min(self._first, max(0, len(lines) - self._page))
        shown = lines[self._first : self._first + self._page]
        yield self._headline()
        for line in (*shown, *[[]] * (self._page - len(shown))):
            yield from line
            yield Segment.line()
        yield self._keys(len(shown), len(lines))

    def _headline(self) -> Text:
        if not self.samples:
            return Text("llm-datadist top: asking", "reverse")
        answers = sum(each.stats is not None for each in self.samples)
        said = f"{answers} of {len(self.samples)} clusters answer"
        now = "paused" if self.is_paused else time.strftime("%H:%M:%S")
        style = "reverse" if answers == len(self.samples) else "reverse red"
        return Text(f"llm-datadist top: {said}, {now}", style, no_wrap=True, overflow="ellipsis")

    def _keys(self, shown: int, count: int) -> Text:
        place = f"  lines {self._first + 1} to {self._first + shown} of {count}"
        text = _KEYS if shown == count else _KEYS + place
        return Text(text, "reverse", end="", no_wrap=True, overflow="ellipsis")
