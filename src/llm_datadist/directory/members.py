"""Who is there, as one watcher sees it: pure, its clock is handed in.

An entry is believed for its ttl from when this end last saw it renewed. One that vanished without
its member's last word (somebody emptied the folder, a server lost its data, a lease ran out) is
believed for a ttl more, so that a member that lives can write it again.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final

from llm_datadist.directory.base import Change, Changes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llm_datadist.directory.record import Entry, Record

#: what a watcher remembers at most: more are no fleet, but somebody who fills the directory
MAX_MEMBERS: Final = 100_000
#: so much that is not valid any more costs nothing
_FEW: Final = 64


class Members:
    """The members of a fleet, and what has changed since `take`."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        #: until when each is believed
        self._until: dict[int, float] = {}
        #: when each is looked at, at the latest then; `_due_at` says which of a heap's are valid
        self._due: list[tuple[float, int]] = []
        self._due_at: dict[int, float] = {}
        #: what `take` told last, of those that have changed since
        self._before: dict[int, Record | None] = {}
        #: others were left out
        self.is_full = False

    def __contains__(self, cluster_id: int) -> bool:
        return cluster_id in self._entries

    def ids(self) -> list[int]:
        """Of everybody who is there."""
        return list(self._entries)

    @property
    def next_at(self) -> float | None:
        """When `overdue` has somebody to look at."""
        return self._due[0][0] if self._due else None

    def heard(self, entry: Entry, now: float) -> None:
        """What a member says; it was written or renewed just now, as far as is known here."""
        cluster_id = entry.record.cluster_id
        known = self._entries.get(cluster_id)
        if entry.has_left:
            if known is not None and known.record.incarnation == entry.record.incarnation:
                self._drop(cluster_id)
            return
        if known is None and len(self._entries) >= MAX_MEMBERS:
            self.is_full = True
            return
        if known is None or known.record != entry.record:
            self._before.setdefault(cluster_id, None if known is None else known.record)
        self._entries[cluster_id] = entry
        self.renewed(cluster_id, now)

    def ttl_s(self, cluster_id: int) -> float:
        """Of somebody who is there."""
        return self._entries[cluster_id].ttl_s

    def renewed(self, cluster_id: int, now: float) -> None:
        """It was seen that the member lives. Nothing for who is not there."""
        entry = self._entries.get(cluster_id)
        if entry is None:
            return
        self._until[cluster_id] = now + entry.ttl_s
        if cluster_id not in self._due_at:
            self._schedule(cluster_id)

    def missing(self, cluster_id: int, now: float) -> None:
        """What it said is not there any more: it has one ttl from now on to say it again."""
        entry = self._entries.get(cluster_id)
        if entry is not None:
            self._until[cluster_id] = now + entry.ttl_s
            self._schedule(cluster_id)

    def forgive(self, now: float) -> None:
        """Nothing could be seen for a while: everybody has a ttl from now on."""
        for cluster_id, entry in self._entries.items():
            self._until[cluster_id] = now + entry.ttl_s
        self._due_at = dict(self._until)
        self._due = [(until, cluster_id) for cluster_id, until in self._until.items()]
        heapify(self._due)

    def overdue(self, now: float) -> Iterable[int]:
        """Those whose time is over: they have left, unless they are `renewed` meanwhile."""
        while self._due and self._due[0][0] <= now:
            at, cluster_id = heappop(self._due)
            if self._due_at.get(cluster_id) != at:
                continue
            del self._due_at[cluster_id]
            if self._until[cluster_id] > now:
                self._schedule(cluster_id)
                continue
            yield cluster_id
            if cluster_id in self._entries and cluster_id not in self._due_at:
                self._drop(cluster_id)

    def take(self) -> Changes:
        """What happened since the last time."""
        if not self._before:
            return Changes()
        joined, left, changed = [], [], []
        for cluster_id, before in self._before.items():
            entry = self._entries.get(cluster_id)
            now = None if entry is None else entry.record
            if before is None and now is not None:
                joined.append(now)
            elif before is not None and now is None:
                left.append(before)
            elif before is not None and now is not None and before != now:
                changed.append(Change(before, now))
        self._before = {}
        return Changes(tuple(joined), tuple(left), tuple(changed))

    def _drop(self, cluster_id: int) -> None:
        entry = self._entries.pop(cluster_id)
        del self._until[cluster_id]
        self._due_at.pop(cluster_id, None)
        self._before.setdefault(cluster_id, entry.record)

    def _schedule(self, cluster_id: int) -> None:
        self._due_at[cluster_id] = at = self._until[cluster_id]
        heappush(self._due, (at, cluster_id))
        if len(self._due) > 2 * len(self._due_at) + _FEW:  # most are of who was here once
            self._due = [(due, each) for each, due in self._due_at.items()]
            heapify(self._due)
