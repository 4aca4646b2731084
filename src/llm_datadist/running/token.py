"""Tokens: a call, and what it waits for, as everything that it uses knows it.

What a call has claimed - a place in the gate, a stream - is noted under its token, and lost when
that is over: to be over is one step (`running/gate.py`), which nothing can come between. Rejected:
weak references to objects of the call's frames; a program that keeps the exceptions which it gets,
as test runners and futures do, keeps their frames, too.
"""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING, Protocol

from llm_datadist.core.generations import STALE
from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Container

    from llm_datadist.core.segments import U64


class Wait(Protocol):
    """What a thread of a call may wait for."""

    def cut(self) -> None:
        """The wait ends soon, by an exception. In any thread, also when it has ended already."""
        ...


class Token:
    """A call on a cluster. Thread-safe."""

    __slots__ = ("_running", "cell", "is_cut", "thread", "waits")

    def __init__(self, running: Container[object]) -> None:
        """`running` is the gate's."""
        self._running = running
        #: the one that began it
        self.thread = get_ident()
        #: the word of the ticket that it issued; STALE is written there when it ends
        self.cell: U64 | list[int] = [STALE]
        self.is_cut = False
        #: of all of its threads
        self.waits: dict[Wait, None] = {}

    @property
    def is_over(self) -> bool:
        """Whether the call is not in the gate any more: it has ended, in whatever way."""
        return self not in self._running

    def require(self) -> None:
        """Raises LLMException when the call was cut: whoever notes a wait looks then."""
        if self.is_cut:
            raise given_up()

    def cut(self) -> None:
        """Has all threads of the call end soon. May be called again."""
        self.is_cut = True
        for wait in tuple(self.waits):
            wait.cut()


def given_up() -> LLMException:
    """What a call is told that was not to go on."""
    return LLMException(
        "the rest of the transfer failed, or the cluster is being finalized",
        LLMStatusCode.LLM_FAILED,
    )
