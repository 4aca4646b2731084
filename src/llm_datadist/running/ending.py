"""The end of a cluster: what was started is ended in reverse order, whatever fails on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException
from llm_datadist.observe.log import get_logger
from llm_datadist.running.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable


#: what each step has, however late it is
_LEAST_S = 0.25


class Ending:
    """What is still to be ended. For the thread that starts and ends a cluster.

    As contextlib.ExitStack, but that a step which fails is logged and keeps no other from its turn:
    a transport's mistake must not keep memory, sockets and threads. One that is interrupted is left
    to the next call, so that steps may come twice.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[Deadline], object]]] = []

    def add(self, what: str, end: Callable[[Deadline], object]) -> None:
        """This has been started; ending it must not outlast the deadline it is given."""
        self._steps.append((what, end))

    def run(self, deadline: Deadline) -> None:
        """Ends all, the last one first. May be called again."""
        while self._steps:
            what, end = self._steps[-1]
            try:
                # one that used up the time does not leave the others without any
                end(Deadline.after(max(_LEAST_S, deadline.remaining_s())))
            except Exception as error:
                is_expected = isinstance(error, LLMException)
                get_logger().error(
                    "ending %s failed: %s", what, error, exc_info=None if is_expected else error
                )
            self._steps.pop()
