"""The plan of a follower: pure, its clock and its dice are handed in.

It knows who is announced, and who is linked, and decides what to do next. What it decides is done
by somebody else (`driver.py`), who says what came of it. A member is known by its cluster id *and*
incarnation: what comes late about another start of it is not taken for news of this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from llm_datadist.directory.base import Changes
    from llm_datadist.directory.record import Record
    from llm_datadist.following.wants import Wants

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 30.0
#: a link that ends sooner is as good as none
STEADY_S: Final = 2.0
#: links that are being made at a time
MOST_AT_ONCE: Final = 16
#: so many that wait for a place in vain cost nothing
_FEW: Final = 64
#: starts that were replaced and are remembered, of all members
_MOST_REPLACED: Final = 4096


class Link(NamedTuple):
    """Link to that member; `Plan.made` or `Plan.failed` follows."""

    record: Record


class Leave(NamedTuple):
    """Unlink that incarnation with its consent, or without when it says nothing."""

    record: Record
    because: str


class MakeRoom(NamedTuple):
    """Unlink one of `Plan.yielding` that is not in use; `Plan.made_room` follows."""

    record: Record  #: who needs its place


class Cut(NamedTuple):
    """Drop the links to all other incarnations of that id: they are of the past."""

    record: Record


Action: TypeAlias = "Link | Leave | MakeRoom | Cut"


@dataclass(slots=True)
class Member:
    """Somebody who is announced, and how far it is linked. Read in any thread."""

    record: Record
    objection: str  #: why it is not wanted
    is_wanted: bool  #: at once, or since somebody asked for it
    is_linked: bool = False
    is_linking: bool = False
    is_asked: bool = False  #: somebody waits for the link
    gets_room: bool = False  #: another one is being unlinked for it
    linked_at: float = 0.0
    attempts: int = 0
    problem: str = ""  #: why the last attempt failed
    retry_at: float = 0.0
    used_at: float = 0.0

    @property
    def takes_a_place(self) -> bool:
        """Whether its link is one of `Wants.max_links`: others link to us as they like."""
        return self.is_linked and not self.objection

    @property
    def state(self) -> str:
        """In a word."""
        if self.is_linked:
            return "linked"
        if self.objection:
            return "unfit"
        if self.is_linking:
            return "linking"
        return "retries" if self.attempts else "known"


class Plan:
    """Who is to be linked. `wants` None: nobody, and the fleet is only looked at."""

    def __init__(
        self,
        cluster_id: int,
        wants: Wants | None,
        facts: Mapping[str, str],
        dice: Callable[[], float],
    ) -> None:
        """`dice` gives numbers of [0, 1)."""
        self._cluster_id = cluster_id
        self._wants = wants
        self._facts = facts
        self._dice = dice
        #: by cluster id; may be read in any thread
        self.members: dict[int, Member] = {}
        self.is_paused = False
        #: starts that others have taken the place of, as cluster id and incarnation, in that order
        self._replaced: dict[tuple[int, str], None] = {}
        #: who waits for its pause to end, and who for a place, the heaviest first
        self._pausing: list[tuple[float, int]] = []
        self._ready: list[tuple[int, int]] = []
        self._actions: list[Action] = []
        #: what is being linked, as above; and how many are that take a place
        self._linking: set[tuple[int, str]] = set()
        self._num_linked = 0

    # -- what happened --

    def told(self, changes: Changes, now: float) -> None:
        """What the directory says."""
        for record in changes.left:
            self._left(record)
        for change in changes.changed:
            self._changed(change.before, change.now, now)
        for record in changes.joined:
            self._joined(record, now)

    def asked(self, cluster_id: int, now: float) -> None:
        """Somebody would use a link to it now."""
        member = self.members.get(cluster_id)
        if member is None or member.objection:
            return
        member.used_at = now
        if member.is_linked:
            return
        if not member.is_asked:
            member.is_wanted = member.is_asked = True
            self._wait(member, max(now, member.retry_at))
        # each time: when it was asked for before, all others may have been in use
        self._make_room(member, now)

    def yielding(self) -> list[Record]:
        """Who is linked, and may have to go for others: first who was not used for longest."""
        linked = [member for member in self.members.values() if member.takes_a_place]
        linked.sort(key=lambda member: member.used_at)
        return [member.record for member in linked]

    def made_room(self, record: Record) -> None:
        """What a `MakeRoom` was for has been done, or nobody could go."""
        member = self.find(record.cluster_id, record.incarnation)
        if member is not None:
            member.gets_room = False

    def made(self, cluster_id: int, incarnation: str, now: float) -> None:
        """There is a link to it, whoever made it."""
        member = self.find(cluster_id, incarnation)
        if member is not None and not member.is_linked:
            member.is_linked, member.is_asked = True, False
            member.linked_at, member.problem = now, ""
            self._num_linked += member.takes_a_place

    def ended(
        self, cluster_id: int, incarnation: str, now: float, *, has_yielded: bool = False
    ) -> None:
        """There is no link to it any more; `has_yielded`: to make room."""
        member = self.find(cluster_id, incarnation)
        if member is None or not member.is_linked:
            return
        self._num_linked -= member.takes_a_place
        member.is_linked = False
        if now >= member.linked_at + STEADY_S:
            member.attempts = 0
        if self._wants is not None and not self._wants.at_once:
            member.is_wanted = False  # until somebody asks again
        if has_yielded:  # it has failed nobody
            self._wait(member, now)
        else:
            self._pause(member, now)

    def tried(self, record: Record, problem: str, now: float) -> None:
        """What came of a `Link`: nothing to complain of, or why it failed."""
        self._linking.discard((record.cluster_id, record.incarnation))
        member = self.find(record.cluster_id, record.incarnation)
        if member is None:
            return
        member.is_linking = False
        member.problem = problem
        if problem:
            member.is_asked = False  # who still wants it asks again
            self._pause(member, now)

    # -- what to do --

    def decide(self, now: float) -> Iterator[Action]:
        """What is to be done now."""
        while self._pausing and self._pausing[0][0] <= now:
            _, cluster_id = heappop(self._pausing)
            member = self.members.get(cluster_id)
            if member is not None and self._may_link(member, now):
                self._make_ready(member)
                if member.is_asked:
                    self._make_room(member, now)
        while self._ready and not self.is_paused and not self._is_full:
            if len(self._linking) >= MOST_AT_ONCE:
                break
            member = self.members.get(heappop(self._ready)[1])
            if member is not None and self._may_link(member, now):
                member.is_linking = True
                self._linking.add((member.record.cluster_id, member.record.incarnation))
                self._actions.append(Link(member.record))
        actions, self._actions = self._actions, []
        return iter(actions)

    @property
    def next_at(self) -> float | None:
        """When `decide` has something to do, unless something happens before."""
        return self._pausing[0][0] if self._pausing and not self.is_paused else None

    def find(self, cluster_id: int, incarnation: str) -> Member | None:
        """Who is announced just so."""
        member = self.members.get(cluster_id)
        return member if member and member.record.incarnation == incarnation else None

    def was_replaced(self, cluster_id: int, incarnation: str) -> bool:
        """In any thread: whether another start of that id was announced behind this one."""
        return (cluster_id, incarnation) in self._replaced

    # -- parts of the above --

    @property
    def _is_full(self) -> bool:
        if self._wants is None:
            return False
        found = (self.find(*each) for each in self._linking)
        num_coming = sum(member is None or not member.is_linked for member in found)
        return self._num_linked + num_coming >= self._wants.max_links

    def _joined(self, record: Record, now: float) -> None:
        objection = self._objection(record)
        at_once = self._wants is not None and self._wants.at_once
        member = self.members[record.cluster_id] = Member(record, objection, at_once)
        self._replaced.pop((record.cluster_id, record.incarnation), None)
        if at_once and not objection:
            self._wait(member, now)

    def _left(self, record: Record) -> None:
        member = self.find(record.cluster_id, record.incarnation)
        if member is not None:
            del self.members[record.cluster_id]
            self._num_linked -= member.takes_a_place
            if member.is_linked:
                self._actions.append(Leave(record, "it has left the fleet"))

    def _changed(self, before: Record, now_is: Record, now: float) -> None:
        member = self.find(before.cluster_id, before.incarnation)
        if member is None or before.incarnation != now_is.incarnation:
            was_used = member is not None and (member.is_linked or self._is_asked_for(member))
            if member is not None:
                self._num_linked -= member.takes_a_place
            self.members.pop(before.cluster_id, None)
            self._replace(before)
            self._actions.append(Cut(now_is))
            self._joined(now_is, now)
            if was_used:
                self.asked(now_is.cluster_id, now)
            return
        self._num_linked -= member.takes_a_place
        member.record, member.objection = now_is, self._objection(now_is)
        self._num_linked += member.takes_a_place
        if member.objection and member.is_linked:
            self._actions.append(Leave(now_is, member.objection))
        elif not member.is_linked:
            member.attempts = 0
            self._wait(member, now)

    def _is_asked_for(self, member: Member) -> bool:
        """Whether a call has named it, and not only the fleet."""
        is_lazy = self._wants is not None and not self._wants.at_once
        return member.is_asked or (is_lazy and member.is_wanted)

    def _make_room(self, member: Member, now: float) -> None:
        """If it needs a place, and would use one now."""
        if self._is_full and self._may_link(member, now) and not member.gets_room:
            member.gets_room = True
            self._actions.append(MakeRoom(member.record))

    def _replace(self, record: Record) -> None:
        """Others may write what they like: of what they wrote so much is remembered."""
        self._replaced[record.cluster_id, record.incarnation] = None
        if len(self._replaced) > _MOST_REPLACED:
            del self._replaced[next(iter(self._replaced))]

    def _objection(self, record: Record) -> str:
        if self._wants is None:
            return "nobody is linked to from here"
        return self._wants.objection(self._facts, record)

    def _may_link(self, member: Member, now: float) -> bool:
        return (
            member.is_wanted
            and not member.objection
            and not member.is_linked
            and not member.is_linking
            and member.retry_at <= now
        )

    def _wait(self, member: Member, until: float) -> None:
        member.retry_at = until
        heappush(self._pausing, (until, member.record.cluster_id))

    def _pause(self, member: Member, now: float) -> None:
        """Longer each time, and never for all members of a fleet alike."""
        longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(member.attempts, 20))
        member.attempts += 1
        self._wait(member, now + longest_s * (0.5 + 0.5 * self._dice()))

    def _make_ready(self, member: Member) -> None:
        """It waits for a place. As long as there is none nobody goes from there but here."""
        cluster_id = member.record.cluster_id
        weight = -1 if member.is_asked else self._weight(cluster_id)
        heappush(self._ready, (weight, cluster_id))
        if len(self._ready) > 4 * len(self.members) + _FEW:  # most are of the past, or there twice
            self._ready = [each for each in set(self._ready) if each[1] in self.members]
            heapify(self._ready)

    def _weight(self, cluster_id: int) -> int:
        """In another order at each cluster, so that not all link to the same few."""
        both = f"{self._cluster_id}/{cluster_id}".encode()
        return int.from_bytes(blake2b(both, digest_size=8).digest(), "big")
