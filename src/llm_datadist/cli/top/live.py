"""The live view: clusters are asked in one thread, keys and the terminal are another's."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live

from llm_datadist.cli.top.screen import Screen
from llm_datadist.cli.top.view import view

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llm_datadist.cli.top.order import Order
    from llm_datadist.cli.top.samples import Sample

_MOST_KEYS = 1024


def watch(take: Callable[[], list[Sample]], interval_s: float, order: Order) -> None:
    """Until `q` or Ctrl-C. What is no terminal gets one pair of tables after the other."""
    console = Console()
    if console.is_terminal and not console.is_dumb_terminal:
        _on_terminal(console, Screen(order=order), take, interval_s)
    else:
        _on_paper(console, Screen(order=order), take, interval_s)


def _on_paper(
    console: Console, screen: Screen, take: Callable[[], list[Sample]], interval_s: float
) -> None:
    while True:
        screen.show(take())
        console.print(time.strftime("%H:%M:%S"), view(screen.samples, screen.before, screen.order))
        time.sleep(interval_s)


def _on_terminal(
    console: Console, screen: Screen, take: Callable[[], list[Sample]], interval_s: float
) -> None:
    taken: SimpleQueue[list[Sample]] = SimpleQueue()
    with (
        _bell() as (bell, ring),
        _single_keys() as keys,
        Live(screen, console=console, screen=True, auto_refresh=False) as live,
    ):

        def ask() -> None:
            while True:
                taken.put(take())
                ring()
                time.sleep(interval_s)

        Thread(target=ask, daemon=True).start()
        while not screen.is_over:
            live.update(screen, refresh=True)
            ready, _, _ = select.select([bell, *keys], [], [])
            if bell in ready:
                os.read(bell, _MOST_KEYS)
                while not taken.empty():
                    screen.show(taken.get())
            for terminal in set(ready) - {bell}:
                typed = os.read(terminal, _MOST_KEYS)
                if not typed:  # nobody types there any more
                    keys.clear()
                screen.press(typed.decode(errors="replace"))


@contextmanager
def _bell() -> Iterator[tuple[int, Callable[[], None]]]:
    """What can be waited for beside keys, and what rings it; another size of the terminal does."""
    reader, writer = os.pipe()

    def ring(*_: object) -> None:
        os.write(writer, b"!")

    before = signal.signal(signal.SIGWINCH, ring)
    try:
        yield reader, ring
    finally:
        signal.signal(signal.SIGWINCH, before)  # the pipe stays: a thread may ring it yet


@contextmanager
def _single_keys() -> Iterator[list[int]]:
    """The terminal that is typed on, if there is one; keys come at once, and are not shown."""
    terminal = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    if terminal is None:
        yield []
        return
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield [terminal]
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
