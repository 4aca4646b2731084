"""Threads that do what is handed to them, and lose nothing."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


class Crew:
    """At most so many threads, which come with the work and go when there is none. Thread-safe.

    A job that `put` takes is called once, sooner or later, whatever other jobs raise: there is no
    state in which one is kept and nobody comes for it. In a forked child, which has none of the
    threads, it takes none, and has none to wait for.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name, self._size = name, size
        self._process = os.getpid()
        # taken by `with`, not the condition, whose own code a signal's handler may raise in
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._jobs: deque[Callable[[], None]] = deque()
        self._num_threads = 0

    @property
    def is_inherited(self) -> bool:
        """Whether it is another process's, from which this one was forked."""
        return os.getpid() != self._process

    def put(self, job: Callable[[], None]) -> None:
        """Has a job done. When this raises, no thread could be started, and the job is not kept."""
        if self.is_inherited:  # the lock may be a thread's that is not here
            raise ChildProcessError("this process was forked from the one that has the threads")
        with self._lock:
            if self._num_threads < self._size:
                try:
                    threading.Thread(target=self._work, name=self._name, daemon=True).start()
                    self._num_threads += 1
                except (RuntimeError, MemoryError):
                    if not self._num_threads:
                        raise
            self._jobs.append(job)

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when nothing is left to do, or after that time."""
        if self.is_inherited:
            return
        with self._lock:
            self._changed.wait_for(lambda: self._num_threads <= 0, timeout_s)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except BaseException:
                logger.exception("a job of %s failed", self._name)

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            if self._jobs:
                return self._jobs.popleft()
            self._num_threads -= 1
            self._changed.notify_all()
            return None
