"""Shares: threads that several parties have in common, so that none keeps them from the others.

Guaranteed: the parties that want a thread have it by turns, one piece of work each, and no party
has more than its bound at a time; what it wants beyond that waits, and keeps nobody else waiting. A
thread is asked of the pool for each piece of work, and does the piece whose turn it is then; it
goes on while any is left that may be done. Any thread may call. `_lock` is taken last.

So it is with the one thread of a loop, there without a lock (`LoopShares`).
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException
from llm_datadist.locks import make_lock
from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.running.loop import RoundsLoop
    from llm_datadist.running.threads import Threads


class Shares:
    """A pool of threads that parties share. Thread-safe."""

    def __init__(self, threads: Threads, per_party: int) -> None:
        self._threads = threads
        self._per_party = per_party
        self._lock = make_lock()
        #: what waits; the party whose turn it is comes first
        self._waiting: dict[object, deque[Callable[[], object]]] = {}
        #: how many threads each party has
        self._running: Counter[object] = Counter()

    def start(self, party: object, work: Callable[[], object]) -> None:
        """Has a thread do this when it is the party's turn.

        Raises LLMException(LLM_FAILED), as `Threads.start` does; the work is not done then.
        """
        with self._lock:
            self._waiting.setdefault(party, deque()).append(work)
        try:
            self._threads.start(self._run)
        except LLMException:
            if self._has_taken_back(party, work):
                raise

    def _has_taken_back(self, party: object, work: Callable[[], object]) -> bool:
        """Whether the work still waited, which it does no more."""
        with self._lock:
            queue = self._waiting.get(party, deque())
            if work not in queue:
                return False
            queue.remove(work)
            if not queue:
                del self._waiting[party]
            return True

    def _run(self) -> None:
        while (turn := self._next()) is not None:
            party, work = turn
            try:
                work()
            except BaseException:  # nobody else would see it, and others wait
                get_logger().exception("work for a peer failed")
            finally:
                del turn, work
                self._leave(party)

    def _next(self) -> tuple[object, Callable[[], object]] | None:
        """The work whose turn it is; None when there is none that may be done now."""
        with self._lock:
            ready = (each for each in self._waiting if self._running[each] < self._per_party)
            party = next(ready, None)
            if party is None:
                return None
            queue = self._waiting.pop(party)
            work = queue.popleft()
            if queue:  # behind all others
                self._waiting[party] = queue
            self._running[party] += 1
            return party, work

    def _leave(self, party: object) -> None:
        with self._lock:
            self._running[party] -= 1
            if not self._running[party]:
                del self._running[party]


class LoopShares:
    """The thread of an asyncio loop, which parties share. Belongs to that thread.

    Each party has one turn in a round of the loop's, however many connections it has. Who asks once
    a round costs the loop nothing: a call of the loop's in the next round, for each request, took
    as long as a small answer.
    """

    def __init__(self, loop: RoundsLoop) -> None:
        self._loop = loop
        #: what waits, of parties that have had their turn
        self._waiting: dict[object, deque[Callable[[], object]]] = {}
        self._round = 0
        #: the parties that have had theirs in that round, by id: none is kept
        self._served: set[int] = set()

    def start(self, party: object, work: Callable[[], object]) -> None:
        """Does this: now, if the party has not had its turn, or when it is its turn again."""
        waiting = self._waiting.get(party)
        if waiting is not None:
            waiting.append(work)
        elif self._loop.round == self._round and id(party) in self._served:
            self._waiting[party] = deque((work,))
            self._loop.call_soon(self._go_on, party)  # in the next round
        else:
            self._serve(party, work)

    def _go_on(self, party: object) -> None:
        waiting = self._waiting[party]
        work = waiting.popleft()
        if waiting:
            self._loop.call_soon(self._go_on, party)
        else:
            del self._waiting[party]
        self._serve(party, work)

    def _serve(self, party: object, work: Callable[[], object]) -> None:
        if self._loop.round != self._round:
            self._round = self._loop.round
            self._served.clear()
        self._served.add(id(party))
        work()
