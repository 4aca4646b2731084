"""The loop: one thread of a cluster, in which its connections wait, and which nothing may block."""

from __future__ import annotations

import asyncio
import selectors
import socket
import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.locks import holds_lock
from llm_datadist.running.bell import Latch
from llm_datadist.running.threads import start_thread
from llm_datadist.system_errors import refusals_ignored

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from llm_datadist.running.deadline import Deadline

T = TypeVar("T")

_INSIST_S = 0.1


class CannotWait(LLMException):
    """This thread cannot wait for the loop's, which may need what this one holds."""

    def __init__(self) -> None:
        super().__init__(
            "links cannot be made or ended here: a finalizer or a signal's handler has interrupted "
            "what the cluster's thread waits for",
            LLMStatusCode.LLM_FAILED,
        )


class Loop:
    """An asyncio loop in a thread of its own, from `start` to `close`.

    Raises OSError when the system has no descriptors for it.
    """

    def __init__(self) -> None:
        self.asyncio = RoundsLoop()
        self._thread: threading.Thread | None = None
        #: what other threads wait for
        self._jobs: dict[_Job[Any], None] = {}
        self._last: _Job[None] | None = None
        #: what nobody waits for
        self._spawned: set[asyncio.Task[None]] = set()
        self._is_ending = False
        self._is_stopped = False

    def start(self) -> None:
        """Raises LLMException(LLM_FAILED) when the system has no thread to give."""
        start_thread(self._run, "llm-datadist-loop")

    def _run(self) -> None:
        # here, since whoever starts a thread may be interrupted behind its first step
        self._thread = threading.current_thread()
        if not self._is_ending:
            self.asyncio.run_forever()

    def run(self, work: Callable[[], Coroutine[object, object, T]], deadline: Deadline) -> T:
        """Runs a coroutine in the loop's thread, from any other one, and waits for it.

        At the deadline, and when the caller is interrupted, it is cancelled. Raises what it raises;
        LLMException with LLM_FAILED when the loop ends meanwhile, LLM_TIMEOUT at the deadline;
        CannotWait.
        """
        return run_in_each([(self, work)], deadline)[0]

    def _take(self, job: _Job[Any]) -> None:
        """Raises LLMException when the loop has ended; CannotWait."""
        thread = self._thread
        if (thread is not None and thread.ident == threading.get_ident()) or holds_lock():
            raise CannotWait
        self._jobs[job] = None
        if self._is_ending or not self._has_taken(job):
            raise _finalized()

    def finish(
        self, work: Callable[[], Coroutine[object, object, None]], deadline: Deadline
    ) -> None:
        """Runs the last coroutine in the loop's thread: no more work is taken from other threads.

        It goes on when the caller is interrupted; called again, this waits for the same one. Does
        nothing where the loop has not started. Raises LLMException(LLM_TIMEOUT).
        """
        self._is_ending = True
        if self._thread is None:
            return
        if self._last is None:
            self._last = _Job(work)
        job = self._last
        self._jobs[job] = None
        if not self._has_taken(job):
            return
        if not job.over.wait(max(0.0, deadline.remaining_s())):
            self.call_soon(job.cancel)
            raise deadline.expired("the end of the links")
        job.result()

    def _has_taken(self, job: _Job[Any]) -> bool:
        try:
            self.asyncio.call_soon_threadsafe(self._begin, job)
        except RuntimeError:
            if not self.asyncio.is_closed():
                raise  # a signal's handler did
            return False
        return True

    def _begin(self, job: _Job[Any]) -> None:
        """In the loop's thread: no task that it has no time left for, which would stay pending."""
        if not self._is_stopped:
            job.start(self.asyncio)

    def call_soon(self, call: Callable[[], object]) -> None:
        """Has the loop's thread call what is quick. Takes no lock: finalizers of objects may."""
        try:
            self.asyncio.call_soon_threadsafe(call)
        except RuntimeError:
            if not self.asyncio.is_closed():  # else nothing is left to be done
                raise

    def spawn(self, work: Callable[[], Coroutine[object, object, None]]) -> None:
        """Has the loop's thread run a coroutine, for which nobody waits. In any thread.

        When the loop ends it is cancelled, or not even made: there is no time left for it then.
        """

        def begin() -> None:
            if not self._is_stopped:
                task = self.asyncio.create_task(work())
                self._spawned.add(task)
                task.add_done_callback(self._spawned.discard)

        self.call_soon(begin)

    def close(self, deadline: Deadline) -> None:
        """Ends the thread; whoever waits for work in it waits no more.

        May be called before `start`. Raises LLMException(LLM_TIMEOUT).
        """
        self._is_ending = True
        jobs = list(self._jobs)
        thread = self._thread
        if thread is not None:
            self.call_soon(self._stop)
            thread.join(max(0.0, deadline.remaining_s()))
        for job in jobs:
            job.over.set()
        if thread is not None and thread.is_alive():
            raise deadline.expired("the end of the cluster's thread")
        self.asyncio.close()

    def _stop(self) -> None:
        """In the loop's thread: what is left is cancelled, and then it ends."""
        self._is_stopped = True
        for task in asyncio.all_tasks(self.asyncio):
            task.cancel()
        self.asyncio.call_soon(self.asyncio.stop)


def run_in_each(
    works: Sequence[tuple[Loop, Callable[[], Coroutine[object, object, T]]]], deadline: Deadline
) -> list[T]:
    """Runs a coroutine in each of several loops, all at once, as `Loop.run` does in one.

    When one raises, the others are cancelled.
    """
    jobs = [(loop, _Job(work)) for loop, work in works]
    try:
        for loop, job in jobs:
            loop._take(job)
        for _, job in jobs:
            if not job.over.wait(max(0.0, deadline.remaining_s())):
                raise deadline.expired("work of the cluster's thread")
        return [job.result() for _, job in jobs]
    except BaseException:
        for loop, job in jobs:
            loop.call_soon(job.cancel)
        raise
    finally:
        for loop, job in jobs:
            loop._jobs.pop(job, None)


class _Job(Generic[T]):
    """A coroutine that another thread waits for. No Future of concurrent: see running/bell.py."""

    def __init__(self, work: Callable[[], Coroutine[object, object, T]]) -> None:
        # made where it runs: one that an interrupted caller had would never be awaited
        self._work = work
        self._task: asyncio.Task[T] | None = None
        self._is_cancelled = False
        self.over = Latch()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """May be called again."""
        if self._task is not None or self._is_cancelled:
            return
        self._task = loop.create_task(self._work())
        self._task.add_done_callback(lambda _: self.over.set())

    def cancel(self) -> None:
        """In the loop's thread, or where the loop is closed. May be called again."""
        self._is_cancelled = True
        if self._task is not None:
            self._task.cancel()

    def result(self) -> T:
        if self._task is None or not self._task.done() or self._task.cancelled():
            raise _finalized()
        return self._task.result()


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks until they end: once may not do, `wait_for` of Python < 3.12 swallows some."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_INSIST_S)


class _Selector(selectors.DefaultSelector):
    """Counts how often it was asked."""

    count = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.count += 1
        return super().select(timeout)


class RoundsLoop(asyncio.SelectorEventLoop):
    """Counts its rounds, and does not take a handler's exception for its own socket's."""

    _csock: socket.socket | None

    def __init__(self) -> None:
        """Raises OSError when the system has no descriptors for it."""
        self._counting = _Selector()
        try:
            for end in socket.socketpair():  # one without them complains when it is dropped
                end.close()
            super().__init__(self._counting)
        except OSError:
            self._counting.close()
            raise

    @property
    def round(self) -> int:
        """In each it looks once for what has come."""
        return self._counting.count

    def _write_to_self(self) -> None:
        sock = self._csock
        if sock is not None:
            with refusals_ignored():  # it is full, and wakes the loop anyway, or is closed
                sock.send(b"\0")


def _finalized() -> LLMException:
    return LLMException("the cluster was finalized meanwhile", LLMStatusCode.LLM_FAILED)
