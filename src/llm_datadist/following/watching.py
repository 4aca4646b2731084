"""The thread that watches the directory, and passes on what it says."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from llm_datadist.directory.base import Changes, Directory, DirectoryError
from llm_datadist.following.pauses import Pauses
from llm_datadist.observe.log import get_logger
from llm_datadist.running.bell import Latch

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.directory.base import Watch
    from llm_datadist.running.deadline import Deadline

#: a wait that hears nothing is begun anew; nothing depends on it
_WAIT_S: Final = 3600.0


class Watcher:
    """What a directory says, in a thread of its own: `run`."""

    def __init__(
        self,
        directory: Directory,
        tell: Callable[[Changes], object],
        wait_first: Callable[[], object],
        longest_pause_s: float,
    ) -> None:
        """Both are called in that thread. The pause is that behind a failure."""
        self._pauses = Pauses(longest_pause_s)
        self._directory = directory
        #: opened by its thread: who makes this may be interrupted behind it
        self._watch: Watch | None = None
        self._tell = tell
        self._wait_first = wait_first
        self._ending = Latch()
        self._over = Latch()
        #: why the directory cannot be asked; empty when it can
        self.problem = ""

    def stop(self) -> None:
        """From any thread. May be called again."""
        self._ending.set()
        watch = self._watch
        if watch is not None:
            watch.interrupt()

    def join(self, deadline: Deadline) -> None:
        """Behind `stop`. Raises LLMException(LLM_TIMEOUT): a directory does not answer."""
        if not self._over.wait(max(0.0, deadline.remaining_s())):
            raise deadline.expired("the last answer of the directory")

    def give_up(self) -> None:
        """There is no thread for it."""
        self._over.set()

    def run(self) -> None:
        """The thread's work."""
        try:
            self._wait_first()
            self._watch = watch = self._directory.watch()
            try:
                self._listen(watch)
            finally:
                watch.close()
        except Exception as error:  # another package's directory cannot even be opened, or closed
            self._complain(f"{error!r}")
        finally:
            self._over.set()

    def _listen(self, watch: Watch) -> None:
        while not self._ending.is_set:
            try:
                # not at all behind a failure: that it answers is news
                changes = watch.wait(0.0 if self.problem else _WAIT_S)
            except DirectoryError as error:
                self._complain(str(error))
                self._ending.wait(self._pauses.next_s())
            except Exception as error:  # another package's directory
                self._complain(f"{error!r}")
                self._ending.wait(self._pauses.next_s())
            else:
                had_problem, self.problem = bool(self.problem), ""
                self._pauses.reset()
                if changes:
                    self._tell(changes)
                if had_problem:
                    with suppress(Exception):  # as in `_complain`
                        get_logger().info("%s answers again", self._directory)

    def _complain(self, problem: str) -> None:
        """Once for each problem: it may last for hours."""
        is_new, self.problem = problem != self.problem, problem
        if is_new:
            with suppress(Exception):  # a logging handler of the program's, and this goes on
                get_logger().warning(
                    "the fleet is not heard of; links stay as they are: %s", problem
                )
