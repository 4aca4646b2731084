"""The end of a cluster: what was started is ended in reverse order, whatever fails on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable


class Ending:
    """What is still to be ended. For the thread that starts and ends a cluster.

    As contextlib.ExitStack, but that a step which fails is logged and keeps no other from its turn:
    a transport's mistake must not keep memory, sockets and threads.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def add(self, what: str, end: Callable[[], object]) -> None:
        """This has been started."""
        self._steps.append((what, end))

    def run(self) -> None:
        """Ends all, the last one first. May be called again."""
        while self._steps:
            what, end = self._steps.pop()
            try:
                end()
            except Exception:
                get_logger().exception("ending %s failed", what)
