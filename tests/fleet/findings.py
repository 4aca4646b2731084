"""What came of the load: whose pulls failed and why, and how soon all was well again."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from fleet.worker import DEADLINE_S, GOOD, STRANGE, WRONG

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fleet.run import Played
    from fleet.stage import Event
    from fleet.worker import Pull

#: behind an event its subject's own pulls, and those from it, may still fail for so long
GRACE_S = 8.0
#: who is not well again by then, without anything else, is a finding
RECOVERY_S = 10.0
#: over the deadline, and a fifth, as two busy cores need it
SCHEDULING_S = 0.5


@dataclass
class Kind:
    """Of one kind of event."""

    events: int = 0
    concerned: int = 0  #: pulls of or from the subject that failed meanwhile
    #: from the end of an event to the subject's first good pull
    recoveries_s: list[float] = field(default_factory=list)
    unrecovered: int = 0


@dataclass
class Findings:
    """All of it."""

    pulls: int = 0
    good: int = 0
    late: int = 0
    crashes: int = 0  #: processes that ended by themselves
    wrong: list[Pull] = field(default_factory=list)
    unconcerned: list[Pull] = field(default_factory=list)
    kinds: dict[str, Kind] = field(default_factory=lambda: defaultdict(Kind))

    @property
    def is_clean(self) -> bool:
        unrecovered = sum(kind.unrecovered for kind in self.kinds.values())
        trouble = self.late or self.crashes or self.wrong or self.unconcerned or unrecovered
        return not trouble


def find(played: Played, pulls: Iterable[Pull]) -> Findings:
    """Looks at every pull that began when the fleet was complete."""
    events = [_with_outages(event, played.events) for event in played.events]
    findings = Findings()
    by_subject: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        by_subject[event.subject].append(event)
        findings.kinds[event.kind].events += 1
    good: dict[int, list[Pull]] = defaultdict(list)
    for pull in pulls:
        if pull.began < played.began:
            continue
        findings.pulls += 1
        took = pull.ended - pull.began
        concerning = [
            event
            for subject in (pull.reader, pull.owner)
            for event in by_subject[subject]
            if event.began <= pull.ended and pull.began <= event.ended + GRACE_S
        ]
        if pull.status == GOOD:
            findings.good += 1
            good[pull.owner].append(pull)
            good[pull.reader].append(pull)
        elif pull.status == WRONG or pull.status.startswith(STRANGE):
            findings.wrong.append(pull)
        elif concerning:
            findings.kinds[concerning[-1].kind].concerned += 1
        else:
            findings.unconcerned.append(pull)
        is_stopped = any(event.kind.startswith("stopped") for event in concerning)
        if took > 1.2 * DEADLINE_S + SCHEDULING_S and not is_stopped:
            findings.late += 1
    for event in events:
        if event.subject:
            later = [each for each in by_subject[event.subject] if each.began > event.began]
            _add_recovery(findings.kinds[event.kind], event, good[event.subject], later)
    return findings


def _began(event: Event) -> float:
    return event.began


def _with_outages(event: Event, events: Iterable[Event]) -> Event:
    """One that is not over before the directory is back: nobody can hear of it."""
    ended = event.ended
    for outage in sorted((each for each in events if each.subject == 0), key=_began):
        if outage.began <= ended + GRACE_S:
            ended = max(ended, outage.ended)
    return event._replace(ended=ended)


def _add_recovery(kind: Kind, event: Event, good: Iterable[Pull], later: Iterable[Event]) -> None:
    """One to whom the next thing happened before it had recovered does not count."""
    firsts = [pull.ended for pull in good if pull.began >= event.ended and _is_of(event, pull)]
    if any(firsts and each.began < min(firsts) for each in later):
        return
    if firsts:
        kind.recoveries_s.append(min(firsts) - event.ended)
    elif all(each.began > event.ended + RECOVERY_S for each in later):
        kind.unrecovered += 1


def _is_of(event: Event, pull: Pull) -> bool:
    """Whether it shows that the start which the event left behind is well."""
    if not event.tag:
        return True
    mine = pull.read if pull.owner == event.subject else pull.tag
    return mine == event.tag


def rows(findings: Findings) -> list[tuple[str, ...]]:
    """For a table: kind, events, failed pulls concerned, seconds to a good one, never."""
    return [
        (
            name,
            str(kind.events),
            str(kind.concerned),
            f"{median(kind.recoveries_s):.2f}" if kind.recoveries_s else "-",
            f"{max(kind.recoveries_s):.2f}" if kind.recoveries_s else "-",
            str(kind.unrecovered),
        )
        for name, kind in sorted(findings.kinds.items())
    ]
