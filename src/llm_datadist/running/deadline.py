"""Deadlines: the one clock of everything that waits; and tokens, the calls that do.

What a call has claimed - a place in the gate, a stream - is noted under its token, and lost when
that is over: to be over is one step (`running/gate.py`), which nothing can come between. Rejected:
weak references to objects of the call's frames; a program that keeps the exceptions which it gets,
as test runners and futures do, keeps their frames, too.
"""

from __future__ import annotations

import time
from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple, Protocol

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
        #: the word of the ticket that it issued, if any; STALE is written there when it ends
        self.cell: U64 | list[int] = [0]
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
        for wait in list(self.waits):
            wait.cut()


def given_up() -> LLMException:
    """What a call is told that was not to go on."""
    return LLMException(
        "the rest of the transfer failed, or the cluster is being finalized",
        LLMStatusCode.LLM_FAILED,
    )


class Deadline(NamedTuple):
    """A point in time that an operation must not outlast."""

    at: float
    timeout_s: float
    #: the call that has it, which may end in the middle of a wait; None where nothing can cut that
    token: Token | None = None

    @classmethod
    def after(cls, timeout_s: float, token: Token | None = None) -> Deadline:
        return cls(time.monotonic() + timeout_s, timeout_s, token)

    def remaining_s(self) -> float:
        return self.at - time.monotonic()

    def require(self, what: str) -> float:
        """The seconds left. Raises LLMException(LLM_TIMEOUT) when there are none."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise self.expired(what)
        return left

    def expired(self, what: str) -> LLMException:
        return LLMException(
            f"{what} timed out after {self.timeout_s:.3f} s", LLMStatusCode.LLM_TIMEOUT
        )
