"""Movers: a few threads that help a caller with the parts of one large transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.running.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

#: a part smaller than this costs more to hand to a thread than to move
MIN_PART_NBYTES = 1024 * 1024


class Movers:
    """Runs parts side by side: the caller's thread takes one, helpers the others. Thread-safe."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._helpers = Threads(max(1, self.threads - 1), "llm-datadist-mover")

    def parts_of(self, nbytes: int) -> int:
        return max(1, min(self.threads, nbytes // MIN_PART_NBYTES))

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Runs all tasks and returns when none is running any more; raises the first failure."""
        if len(tasks) == 1:
            tasks[0]()
            return
        helped = [(task, self._helpers.submit(task)) for task in tasks[1:]]
        failures: list[BaseException] = []
        _attempt(tasks[0], failures)
        for task, future in helped:
            if future.cancel():  # the helpers are busy with other callers
                _attempt(task, failures)
            else:
                _collect(future, failures)
        if failures:
            raise failures[0]

    def close(self) -> None:
        self._helpers.shutdown(wait=True)


def _attempt(task: Callable[[], None], failures: list[BaseException]) -> None:
    if failures:
        return
    try:
        task()
    except BaseException as error:  # raised again once no part is running any more
        failures.append(error)


def _collect(future: Future[None], failures: list[BaseException]) -> None:
    error = future.exception()
    if error is not None:
        failures.append(error)
