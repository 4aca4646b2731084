"""The loop: one thread of a cluster, in which its connections wait, and which nothing may block."""

from __future__ import annotations

import asyncio
import selectors
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.running.bell import Latch

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from llm_datadist.running.deadline import Deadline

T = TypeVar("T")

_INSIST_S = 0.1


class Loop:
    """An asyncio loop in a thread of its own, from `start` to `close`.

    Raises OSError when the system has no descriptors for it.
    """

    def __init__(self) -> None:
        self.asyncio = _new_loop()
        self._thread = threading.Thread(
            target=self.asyncio.run_forever, name="llm-datadist-loop", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def run(self, work: Coroutine[object, object, T], deadline: Deadline | None = None) -> T:
        """Runs a coroutine in the loop's thread, from any other one, and waits for it.

        At the deadline, and when the caller is interrupted, it is cancelled. Raises what it raises;
        LLMException with LLM_FAILED when the loop ends meanwhile, LLM_TIMEOUT at the deadline.
        """
        job = _Job(work)
        try:
            self.asyncio.call_soon_threadsafe(job.start, self.asyncio)
        except RuntimeError:  # the loop is closed
            work.close()
            raise _finalized() from None
        try:
            timeout_s = None if deadline is None else max(0.0, deadline.remaining_s())
            is_over = job.over.wait(timeout_s)
        except BaseException:
            self.call_soon(job.cancel)
            raise
        if not is_over:
            self.call_soon(job.cancel)
            assert deadline is not None
            raise deadline.expired("work of the cluster's thread")
        return job.result()

    def call_soon(self, call: Callable[[], object]) -> None:
        """Has the loop's thread call what is quick. Takes no lock: finalizers of objects may."""
        with suppress(RuntimeError):  # the loop is closed, and nothing left to be done
            self.asyncio.call_soon_threadsafe(call)

    def close(self, deadline: Deadline) -> None:
        """Ends the thread. May be called before `start`. Raises LLMException(LLM_TIMEOUT)."""
        if self._thread.ident is not None:
            self.call_soon(self.asyncio.stop)
            self._thread.join(max(0.0, deadline.remaining_s()))
            if self._thread.is_alive():
                raise deadline.expired("the end of the cluster's thread")
        self.asyncio.close()


class _Job(Generic[T]):
    """A coroutine that another thread waits for. No Future of concurrent: see running/bell.py."""

    def __init__(self, work: Coroutine[object, object, T]) -> None:
        self._work = work
        self._task: asyncio.Task[T] | None = None
        self.over = Latch()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._task = loop.create_task(self._work)
        self._task.add_done_callback(lambda _: self.over.set())

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def result(self) -> T:
        assert self._task is not None
        if self._task.cancelled():
            raise _finalized()
        return self._task.result()


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks until they end: once may not do, `wait_for` of Python < 3.12 swallows some."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_INSIST_S)


def _new_loop() -> asyncio.AbstractEventLoop:
    selector = selectors.DefaultSelector()
    try:
        for end in socket.socketpair():  # a loop that does not get one complains when it is dropped
            end.close()
        return asyncio.SelectorEventLoop(selector)
    except OSError:
        selector.close()
        raise


def _finalized() -> LLMException:
    return LLMException("the cluster was finalized meanwhile", LLMStatusCode.LLM_FAILED)
