"""Guests: who asks on the streams of one link, and what it may have under way there.

A guest is nobody as long as its link is being made: it may ask what the hand-shake needs, in small
frames. The end that was called tells the link made after it has made it, so its requests may come
before the word: the end that called puts them off for a moment.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.peer.peer import Peer

#: whole tables that are made or sent to one peer: an honest one asks for one at a time
_MAX_TABLES = 4
_WARN_AGAIN_S = 60.0


class Guest:
    """The peer of a link, as those who answer it see it. Belongs to the loop's thread."""

    def __init__(self, *, was_called: bool) -> None:
        #: we called it
        self.was_called = was_called
        #: stands for it where it may have gone
        self.mark = object()
        #: who it is; None while the link is being made. May be read in any thread
        self.peer: Peer | None = None
        self._when_linked: list[Callable[[], object]] = []
        #: who answers it with a whole table
        self._tables: set[object] = set()
        self._warned_at = -math.inf

    @property
    def max_request_nbytes(self) -> int:
        """The largest frame that it may send."""
        is_known = self.was_called or self.peer is not None
        return m.MAX_REQUEST_BODY_NBYTES if is_known else m.MAX_GREETING_NBYTES

    def link_made(self, peer: Peer) -> None:
        """It may ask anything from here on, and what it has asked is taken up."""
        self.peer = peer
        calls, self._when_linked = self._when_linked, []
        for call in calls:
            call()

    def when_linked(self, call: Callable[[], object]) -> None:
        """Has this called when the link is made, if it ever is."""
        self._when_linked.append(call)

    def takes_table(self, who: object) -> bool:
        """Whether there is room for one more whole table; `has_table` must follow."""
        if len(self._tables) >= _MAX_TABLES:
            return False
        self._tables.add(who)
        return True

    def has_table(self, who: object) -> None:
        """The end of `takes_table`. May be called again."""
        self._tables.discard(who)

    def may_warn(self) -> bool:
        """Whether the last warning about it is long ago; one is given now, then.

        Never about who called us and is not linked: there may be any number of those.
        """
        if self.peer is None and not self.was_called:
            return False
        now = time.monotonic()
        if now < self._warned_at + _WARN_AGAIN_S:
            return False
        self._warned_at = now
        return True
