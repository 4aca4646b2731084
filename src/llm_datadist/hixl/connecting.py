"""Connecting in the background: tasks for one engine in order, for others side by side."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.hixl.call import Exhausted
from llm_datadist.hixl.types import AsyncConnectStatus
from llm_datadist.locks import make_lock
from llm_datadist.observe.log import get_logger
from llm_datadist.running.shares import Shares
from llm_datadist.running.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.hixl.names import EngineName
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.running.threads import Errands

_S: Final = AsyncConnectStatus
#: so many engines are told of that are not connected, those whose task was the last
_MOST_ENDED: Final = 1024


class _Task:
    """One task. Thread-safe: only the thread that has it changes it."""

    __slots__ = ("do", "is_connect", "name", "status")

    def __init__(self, name: EngineName, do: Callable[[], None], *, is_connect: bool) -> None:
        self.name = name
        self.do = do
        self.is_connect = is_connect
        self.status = _S.CONNECT_PENDING if is_connect else _S.DISCONNECT_PENDING


class Connecting:
    """The tasks of one engine. Thread-safe."""

    def __init__(
        self,
        threads: int,
        max_queued: int,
        is_connected: Callable[[EngineName], bool],
        errands: Errands,
    ) -> None:
        self._threads = Threads(threads, "llm-datadist-connect")
        self._shares = Shares(self._threads, 1)
        self._max_queued = max_queued
        self._is_connected = is_connected
        self._errands = errands
        self._lock = make_lock()
        #: those that wait for a thread, or for an earlier task of the same engine
        self._queued: dict[_Task, None] = {}
        #: by engine, the one that came last
        self._newest: dict[EngineName, _Task] = {}
        #: from so many on some may be forgotten: to look costs time
        self._most_known = _MOST_ENDED
        self._is_ended = False

    def connect(self, name: EngineName, do: Callable[[], None]) -> None:
        """Has a thread do it when it is its turn. Raises Exhausted; nothing is done then."""
        self._begin(_Task(name, do, is_connect=True))

    def disconnect(self, name: EngineName, do: Callable[[], None]) -> None:
        """As `connect`."""
        self._begin(_Task(name, do, is_connect=False))

    def status_of(self, name: EngineName) -> AsyncConnectStatus:
        """Of the newest task. A connection that has ended since is none."""
        task = self._newest.get(name)
        if task is None:
            return _S.NOT_CONNECT
        status = task.status
        if status is _S.CONNECTED and not self._is_connected(name):
            return _S.NOT_CONNECT
        return status

    def statuses(self) -> dict[EngineName, AsyncConnectStatus]:
        """By engine."""
        return {name: self.status_of(name) for name in list(self._newest)}

    def end(self, deadline: Deadline) -> None:
        """Begins no further task, and ends the threads. Raises LLMException(LLM_TIMEOUT)."""
        self._is_ended = True
        self._threads.end(deadline)

    def _begin(self, task: _Task) -> None:
        self._errands.run(partial(self._start, task))

    def _start(self, task: _Task) -> None:
        with self._lock:
            if len(self._queued) >= self._max_queued:
                raise Exhausted(
                    f"{self._max_queued} tasks wait already (connect_pool.task_queue_capacity)"
                )
            self._forget_some()
            before = self._newest.pop(task.name, None)
            self._queued[task] = None
            self._newest[task.name] = task
            try:
                self._shares.start(task.name, partial(self._do, task))
            except LLMException as error:
                self._queued.pop(task, None)
                if before is None:
                    del self._newest[task.name]
                else:
                    self._newest[task.name] = before
                if self._is_ended:
                    raise
                raise Exhausted(str(error)) from error

    def _forget_some(self) -> None:
        """The oldest ones that have ended in no connection, if there are many of them."""
        if len(self._newest) < self._most_known:
            return
        over = (_S.NOT_CONNECT, _S.CONNECT_FAILED)
        ended = [name for name in self._newest if self.status_of(name) in over]
        for name in ended[: max(0, len(ended) - _MOST_ENDED // 2)]:
            del self._newest[name]
        self._most_known = max(_MOST_ENDED, 2 * len(self._newest))

    def _do(self, task: _Task) -> None:
        """In a thread of ours."""
        self._queued.pop(task, None)
        failed = _S.CONNECT_FAILED if task.is_connect else _S.NOT_CONNECT
        if self._is_ended:
            task.status = failed
            return
        task.status = _S.CONNECTING if task.is_connect else _S.DISCONNECTING
        status = failed
        try:
            task.do()
            status = _S.CONNECTED if task.is_connect else _S.NOT_CONNECT
        except LLMException as error:
            if task.is_connect and error.status_code is LLMStatusCode.LLM_ALREADY_LINK:
                status = _S.CONNECTED
            else:
                what = "connect_async" if task.is_connect else "disconnect_async"
                get_logger().error("%s of %s has failed: %s", what, task.name, error)
        finally:
            task.status = status
