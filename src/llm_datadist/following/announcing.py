"""The thread that announces us, and keeps saying that we are there."""

from __future__ import annotations

import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from llm_datadist.directory.base import Directory, DirectoryError, Superseded
from llm_datadist.following.pauses import Pauses
from llm_datadist.observe.log import get_logger
from llm_datadist.running.bell import Bell

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.directory.base import Announcement
    from llm_datadist.directory.record import Record
    from llm_datadist.running.deadline import Deadline

_LONGEST_PAUSE_S: Final = 30.0
#: who announces itself is heard of before it links to anybody, unless the directory is this slow
_FIRST_S: Final = 5.0
_GONE: Final = "this cluster cannot be announced; links stay as they are: %s"
_SUPERSEDED: Final = "this cluster is announced no more, and links to nobody of its fleet: %s"
#: so often in each ttl: two may be lost
_RENEWALS: Final = 3


def longest_pause_s(ttl_s: float) -> float:
    """Behind a failure: a directory that is back must be told, and heard, within a ttl."""
    return min(_LONGEST_PAUSE_S, ttl_s / _RENEWALS)


class Announcer:
    """What a directory is told, in a thread of its own: `run`.

    It renews by a wait with a deadline, in which it hears at once of what is new to say.
    """

    def __init__(
        self, directory: Directory, ttl_s: float, tell_superseded: Callable[[bool], object]
    ) -> None:
        """In the thread it is told when another start has our place, and when it is ours again."""
        self._directory = directory
        self._tell_superseded = tell_superseded
        self._is_superseded = False
        self._ttl_s = ttl_s
        #: what is to be said, None that we have left; and what was said last
        self._wanted: Record | None = None
        self._said: Record | None = None
        self._announcement: Announcement | None = None
        #: our last word was the last one
        self._is_silent = False
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._is_ending = False
        self._pauses = Pauses(longest_pause_s(ttl_s))
        #: why it could not be said; empty when it was
        self.problem = ""
        self._is_over = False
        self._bell = Bell()
        #: something was tried at least once
        self.num_attempts = 0

    @property
    def is_announced(self) -> bool:
        """Whether the directory has what we want to say, as far as it answered."""
        return self._said is not None and self._said == self._wanted and not self._is_superseded

    def say(self, record: Record | None) -> None:
        """From any thread: this is what we are now; None: we have left."""
        self._wanted = record
        self._wakes.put(None)

    def stop(self) -> None:
        """From any thread: says that we have left, once, and ends. May be called again."""
        self._wanted = None  # first: what is said behind the end's beginning is the last word
        self._is_ending = True
        self._wakes.put(None)

    def wait_until_said(self, timeout_s: float) -> bool:
        """Whether what was to be said was said in time; also when there is nothing to be said."""
        return self._bell.wait_until(lambda: self._said == self._wanted, timeout_s)

    def wait_for_attempt(self) -> None:
        """Until something was tried, or nothing will be, or for a while."""
        self._bell.wait_until(lambda: self.num_attempts or self._is_over, _FIRST_S)

    def join(self, deadline: Deadline) -> None:
        """Behind `stop`. Raises LLMException(LLM_TIMEOUT): a directory does not answer."""
        if not self._bell.wait_until(lambda: self._is_over, max(0.0, deadline.remaining_s())):
            raise deadline.expired("the last word to the directory")

    def give_up(self) -> None:
        """Nothing more is said: it has ended, or there is no thread for it."""
        self._is_over = True
        self._bell.ring()

    def run(self) -> None:
        """The thread's work."""
        try:
            while True:
                is_last = self._is_ending
                pause_s = self._attempt()
                if is_last:
                    return
                self._wait(pause_s)
        finally:
            if self._announcement is not None:
                self._announcement.close()
            self.give_up()

    def _wait(self, pause_s: float) -> None:
        end = time.monotonic() + pause_s
        try:
            while (left_s := end - time.monotonic()) > 0 and not self._is_ending:
                self._wakes.get(timeout=left_s)
                if self._wanted != self._said and not self.problem:
                    return
        except Empty:
            pass

    def _attempt(self) -> float:
        """Says what there is to say; how long to wait behind that."""
        wanted = self._wanted
        try:
            self._tell(wanted)
        except DirectoryError as error:
            if isinstance(error, Superseded):
                self._complain(_SUPERSEDED, str(error), is_bad=True)
                self._is_now_superseded(True)
            else:
                self._complain(_GONE, str(error), is_bad=False)
            pause_s = self._pauses.next_s()
        except Exception as error:  # another package's directory
            self._complain(_GONE, f"{error!r}", is_bad=True)
            pause_s = self._pauses.next_s()
        else:
            had_problem, self._said, self.problem = bool(self.problem), wanted, ""
            self._is_now_superseded(False)
            self._pauses.reset()
            pause_s = self._ttl_s / _RENEWALS
            if had_problem:
                with suppress(Exception):  # as in `_complain`
                    get_logger().info("%s is told again who is here", self._directory)
        self.num_attempts += 1
        self._bell.ring()
        return pause_s

    def _tell(self, wanted: Record | None) -> None:
        if wanted is None:
            if self._announcement is not None and not self._is_silent:
                self._announcement.withdraw()
            self._is_silent = True
            return
        if self._announcement is None:
            self._announcement = self._directory.announce(wanted, self._ttl_s)
        elif wanted == self._said and not self._is_silent:
            self._announcement.renew()
        else:
            self._announcement.change(wanted)
        self._is_silent = False

    def _is_now_superseded(self, is_so: bool) -> None:
        if is_so != self._is_superseded:
            self._is_superseded = is_so
            self._tell_superseded(is_so)

    def _complain(self, text: str, problem: str, *, is_bad: bool) -> None:
        """Once for each problem: it may last for hours."""
        is_new, self.problem = problem != self.problem, problem
        if is_new:
            log = get_logger().error if is_bad else get_logger().warning
            with suppress(Exception):  # a logging handler of the program's, and this goes on
                log(text, problem)
