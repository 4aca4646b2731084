"""The bell: how a thread waits for what another one does, so that an interruption leaves nothing.

A signal's handler runs in the main thread, between any two steps of Python code, and may raise: a
Ctrl-C, a test's time-out. What it strikes in must leave nothing held, or some later call waits for
ever. A `with` on a Lock or RLock of `threading` holds that: entering and leaving are one step each.
`Condition`, `Event`, `Semaphore` and `Future` do not, they are Python code around such a lock: an
exception behind their first step leaves the lock held by nobody. So this library, in what a
program's own thread passes, has plain locks by `with`, tables of tokens (an entry is made and taken
out in one step), and this bell to wait.

A finalizer (`__del__`) is like a signal: the garbage collector runs it in any thread, between any
two steps, also under our locks, and it may call us. So these are re-entrant (RLock), what they
guard makes sense between any two steps, and who goes through a table goes through a copy of it.

A waiting thread has a queue of its own in `waiting`, whose `get` may be interrupted. Ringing puts
something into each, in one step for all. Whoever wakes looks for itself whether what it waits for
is true, so that one ring too many does no harm; whoever makes it true rings afterwards.
"""

from __future__ import annotations

from _thread import get_ident
from operator import methodcaller
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.running.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable

#: wakes a thread that waits: `any(map(WAKE, bell.waiting))`, and to go through a map is one step
WAKE: Final = methodcaller("put", None)
#: a wait of the system's may end by so much before its time
_EARLY_S = 0.005


class Bell:
    """Wakes whoever waits. Thread-safe."""

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        #: a list: who goes through one may begin before it changes
        self.waiting: list[SimpleQueue[None]] = []

    def ring(self) -> None:
        """Something that somebody may wait for has become true."""
        if self.waiting:
            any(map(WAKE, self.waiting))

    def wait_until(self, is_true: Callable[[], object], timeout_s: float | None) -> bool:
        """Waits until it is true; False when it is not in time. None waits for ever."""
        if is_true():
            return True
        deadline = None if timeout_s is None else Deadline.after(timeout_s)
        wakes = SimpleQueue[None]()
        try:
            self.waiting.append(wakes)
            while not is_true():
                try:
                    wakes.get(timeout=None if deadline is None else max(0, deadline.remaining_s()))
                except Empty:
                    if deadline is None or deadline.remaining_s() > _EARLY_S:
                        raise  # a signal's handler did
                    return bool(is_true())
        finally:
            if wakes in self.waiting:
                self.waiting.remove(wakes)
        return True


class Latch:
    """Something that happens once, which any number of threads wait for. Thread-safe."""

    __slots__ = ("_bell", "is_set")

    def __init__(self) -> None:
        self._bell = Bell()
        self.is_set = False

    def set(self) -> None:
        """It has happened. May be called again."""
        self.is_set = True
        self._bell.ring()

    def wait(self, timeout_s: float | None) -> bool:
        """Whether it happened in time."""
        return self._bell.wait_until(lambda: self.is_set, timeout_s)


class TurnInVain(LLMException):
    """A call of this very thread is ahead: it is interrupted by what would wait for it."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} cannot be done here: a finalizer or a signal's handler has interrupted the "
            "call of this thread that would have to end first",
            LLMStatusCode.LLM_FAILED,
        )


class Turns:
    """One call after the other, in the order in which they came. Thread-safe.

    `take` is followed by `leave`, whatever is raised. Where a program's own thread passes, that is
    spelled out, as the end of a call is (running/gate.py): `calls.pop(call, None)`, and the bell.
    """

    __slots__ = ("bell", "calls")

    def __init__(self) -> None:
        #: rung when a call has left
        self.bell = Bell()
        #: in order, each with its thread; the first one has the turn
        self.calls: dict[object, int] = {}

    def take(self, call: object, deadline: Deadline, what: str) -> None:
        """Waits for the turn.

        Raises LLMException(LLM_TIMEOUT) when it does not come in time, TurnInVain when it cannot.
        """
        self.calls[call] = get_ident()
        if list(self.calls.values()).count(get_ident()) > 1:
            raise TurnInVain(what)
        if not self.bell.wait_until(lambda: self._is_first(call), deadline.require(what)):
            raise deadline.expired(what)

    def take_now(self, call: object) -> bool:
        """As `take`, without a wait; whether it has the turn."""
        self.calls[call] = get_ident()
        return self._is_first(call)

    def leave(self, call: object) -> None:
        """The end of `take`. May be called again."""
        self.calls.pop(call, None)
        self.bell.ring()

    def _is_first(self, call: object) -> bool:
        return next(iter(list(self.calls)), None) is call
