"""Movers: a few threads that help a caller with the parts of one large transfer.

Guaranteed: when `run` returns or raises, no part is running and none will. A part is done by
whoever takes it first, a helper or the caller; to take it is one step. However `run` ends - a part
that failed, a signal's exception in the caller - the caller takes back what no helper has begun,
has what runs end soon (`Call`), and waits for that, also when it is interrupted again meanwhile;
each part has a deadline of its own besides. So nothing arrives behind an exception. Where the
system gives no thread to help, the caller does all parts.

Any thread may call `run`, and many may at the same time; helpers that are busy with others are not
waited for. A Call's lock is taken last. Rejected: futures (a caller that is interrupted while it
waits for one leaves its lock held, and the helper waits for that for ever), and leaving parts to
run on behind an exception (their memory may be given back by then).
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.running.bell import Latch
from llm_datadist.running.threads import Errands, Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from llm_datadist.running.deadline import Deadline

#: a part smaller than this costs more to hand to a thread than to move
MIN_PART_NBYTES = 1024 * 1024
_CALLER: Final = "the caller"


class Call:
    """One call of `Movers.run`, as its parts see it. Thread-safe."""

    def __init__(self) -> None:
        self._is_over = False
        self._lock = threading.RLock()
        self._ends: set[Callable[[], None]] = set()

    def require(self) -> None:
        """Raises LLMException when the call has been given up: parts look between two steps."""
        if self._is_over:
            raise LLMException(
                "the rest of the transfer failed, or the cluster is being finalized",
                LLMStatusCode.LLM_FAILED,
            )

    @contextmanager
    def ended_by(self, end: Callable[[], None]) -> Iterator[None]:
        """A part that may wait says how its wait is ended when the call is given up."""
        try:
            with self._lock:
                self._ends.add(end)
            self.require()
            yield
        finally:
            with self._lock:
                self._ends.discard(end)

    def give_up(self, *, cuts: bool) -> None:
        """Has all parts end soon; `cuts`: also those that wait. May be called again."""
        self._is_over = True
        if cuts:
            with self._lock:
                for end in self._ends:
                    end()


Task: TypeAlias = "Callable[[Call], None]"


class _Part:
    """A part of a transfer: taken once, by a helper or by the caller."""

    __slots__ = ("_taken_by", "error", "over", "task")

    def __init__(self, task: Task) -> None:
        self.task = task
        self._taken_by: dict[None, object] = {}
        self.over = Latch()
        self.error: BaseException | None = None

    def take(self, who: object) -> bool:
        """Whether it is theirs; it may have been before."""
        return self._taken_by.setdefault(None, who) is who

    def help(self, call: Call) -> None:
        """In a helper's thread."""
        if self.take(object()):
            try:
                self.task(call)
            except BaseException as error:  # raised again by the caller
                self.error = error
            finally:
                self.over.set()

    def wait(self) -> None:
        """Until no helper runs it, and none will."""
        if not self.take(_CALLER):
            self.over.wait(None)


class Movers:
    """Runs parts side by side: the caller's thread takes some, helpers the others. Thread-safe."""

    def __init__(self, threads: int, errands: Errands | None = None) -> None:
        self.threads = threads
        self._helpers = Threads(max(1, self.threads - 1), "llm-datadist-mover", errands)
        #: those that run
        self._calls: dict[Call, None] = {}
        self._is_stopped = False

    def parts_of(self, nbytes: int) -> int:
        return max(1, min(self.threads, nbytes // MIN_PART_NBYTES))

    def run(self, tasks: Sequence[Task]) -> None:
        """Runs all tasks and returns when none is running any more; raises the first failure."""
        call = Call()
        try:
            self._calls[call] = None
            if self._is_stopped:
                call.give_up(cuts=True)
            call.require()
            if len(tasks) == 1:
                tasks[0](call)
            else:
                self._run([_Part(task) for task in tasks], call)
        finally:
            self._calls.pop(call, None)

    def _run(self, parts: Sequence[_Part], call: Call) -> None:
        try:
            self._ask_for_help(parts[1:], call)
            for part in parts:
                if part.take(_CALLER):
                    part.task(call)
            for part in parts:
                part.wait()
        except BaseException as error:
            # one that failed by itself fails for the others, too, or they are done soon
            _end(parts, call, cuts=not isinstance(error, LLMException))
            raise
        for part in parts:
            if part.error is not None:
                raise part.error

    def stop(self) -> None:
        """What runs, and what is still to run, fails soon: the cluster is finalized."""
        self._is_stopped = True
        for call in tuple(self._calls):
            call.give_up(cuts=True)

    def end(self, deadline: Deadline) -> None:
        """Ends the helpers. Raises LLMException(LLM_TIMEOUT)."""
        self._helpers.end(deadline)

    def _ask_for_help(self, parts: Sequence[_Part], call: Call) -> None:
        try:
            for part in parts:
                self._helpers.start(partial(part.help, call))
        except LLMException:  # no thread is to be had
            return


def _end(parts: Sequence[_Part], call: Call, *, cuts: bool) -> None:
    """Returns when no part runs and none will, whatever interrupts it."""
    while True:
        try:
            call.give_up(cuts=cuts)
            for part in parts:
                part.wait()
        except BaseException:  # the first exception goes on, and says the same
            continue
        return
