"""Notices: short texts that peers send to our program, kept until it asks for them.

What one peer does not get read costs others nothing: each link has a bound of its own, and all
together have one, since what came over links that have ended is kept, too.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from llm_datadist.core import messages as m
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.locks import make_lock

if TYPE_CHECKING:
    from llm_datadist.owner.guest import Guest

#: unread notices of one link, and of all
MAX_OF_ONE: Final = 4096
MAX_OF_ALL: Final = 16 * MAX_OF_ONE


class Notices:
    """Those that are unread. Thread-safe."""

    def __init__(self, *, is_wanted: bool) -> None:
        """Where they are not wanted nobody would ever read them."""
        self._is_wanted = is_wanted
        self._lock = make_lock()
        self._unread: list[m.Notify] = []
        #: how many of them each link's peer has sent. By what stands for it: what its link has is
        #: not kept for as long as nobody asks for its notices
        self._counts: Counter[object] = Counter()

    def keep(self, guest: Guest, notice: m.Notify) -> m.Message:
        """One more.

        Raises LLMException: LLM_FEATURE_NOT_ENABLED, and LLM_FAILED when there are too many.
        """
        if not self._is_wanted:
            raise LLMException(
                "the peer takes no notices: it is a cluster of LLM-DataDist, and no engine of hixl",
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            )
        with self._lock:
            if self._counts[guest.mark] >= MAX_OF_ONE:
                raise _too_many(MAX_OF_ONE)
            if len(self._unread) >= MAX_OF_ALL:
                raise _too_many(MAX_OF_ALL)
            self._counts[guest.mark] += 1
            self._unread.append(notice)
        return m.Done()

    def take(self) -> list[m.Notify]:
        """All that have come, in order; they are read then."""
        with self._lock:
            taken, self._unread = self._unread, []
            self._counts = Counter()
        return taken

    def put_back(self, taken: list[m.Notify]) -> None:
        """The end of `take` where nobody got them. They count for nobody any more."""
        with self._lock:
            self._unread[:0] = taken


def _too_many(count: int) -> LLMException:
    return LLMException(
        f"the peer has {count} unread notices: its program must ask for them (get_notifies)",
        LLMStatusCode.LLM_FAILED,
    )
