"""The place of a cluster id in a directory, as one start of it sees it.

The start that was announced last has it, and keeps it as long as it lives, and so long after that
those who watch have dropped it by then. That nothing is seen of it may have other reasons: somebody
emptied the directory, or we did not look, since the directory was gone, or our host slept. Then it
could not be seen, or not renew anything, and has its whole time anew.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from llm_datadist.directory.record import Entry, Record

#: another start is given up when nothing was seen of it for so many of its ttl
_GIVEN_UP_TTLS: Final = 2


def now_s() -> float:
    """Goes on while this host sleeps: others may not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Place:
    """Whether our start may write there. Pure: the clock is handed in, as `now_s` has it."""

    def __init__(self, ours: Entry) -> None:
        self._ours = ours
        self._rival: Entry | None = None
        self._sign: object = None
        self._signed_at = self._looked_at = float("-inf")

    def rival(self, there: Entry | None, sign: object, now: float) -> Record | None:
        """Another start that has the place, by what lies there; None: it is ours.

        `sign` is another one when that start has renewed its record; that nothing lies there any
        more is one, too, for once.
        """
        if there is not None:
            is_free = there.has_left or there.record.incarnation == self._ours.record.incarnation
            self._rival = None if is_free else there
        if self._rival is None:
            return None
        longest_s = max(self._rival.ttl_s, self._ours.ttl_s)  # between two looks
        if sign != self._sign or now > self._looked_at + longest_s:
            self._sign, self._signed_at = sign, now
        self._looked_at = now
        is_given_up = now >= self._signed_at + _GIVEN_UP_TTLS * self._rival.ttl_s
        return None if is_given_up else self._rival.record
