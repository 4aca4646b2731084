"""The figures of several devices: what each has counted, added up."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import msgspec

from llm_datadist.core.stats import Histogram, LinkEvents, OperationStats, WaitStats

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from llm_datadist.core.stats import ClusterStats

T = TypeVar("T")


def together(each: Sequence[ClusterStats]) -> ClusterStats:
    """Those of a cluster of several devices.

    Links and pools are listed for every device; what was counted is added up. A cache, which has a
    part on every device, is one.
    """
    first = each[0]
    return msgspec.structs.replace(
        first,
        num_links=sum(stats.num_links for stats in each),
        links=tuple(chain.from_iterable(stats.links for stats in each)),
        pools=tuple(chain.from_iterable(stats.pools for stats in each)),
        operations=_sum(
            chain.from_iterable(stats.operations for stats in each),
            lambda one: (one.operation, one.peer, one.path),
            _operations,
        ),
        waits=_sum(
            chain.from_iterable(stats.waits for stats in each), lambda one: one.waited_for, _waits
        ),
        link_events=_sum(
            chain.from_iterable(stats.link_events for stats in each), lambda one: one.path, _events
        ),
        num_silent=sum(stats.num_silent for stats in each),
        num_half_open=sum(stats.num_half_open for stats in each),
        num_turned_away=sum(stats.num_turned_away for stats in each),
    )


def _sum(
    values: Iterable[T], name_of: Callable[[T], Hashable], add: Callable[[T, T], T]
) -> tuple[T, ...]:
    sums: dict[Hashable, T] = {}
    for value in values:
        name = name_of(value)
        sums[name] = add(sums[name], value) if name in sums else value
    return tuple(sums.values())


def _operations(one: OperationStats, other: OperationStats) -> OperationStats:
    failures: dict[str, int] = {}
    for status, count in (*one.failures, *other.failures):
        failures[status] = failures.get(status, 0) + count
    return OperationStats(
        operation=one.operation,
        peer=one.peer,
        path=one.path,
        succeeded=one.succeeded + other.succeeded,
        failures=tuple(failures.items()),
        nbytes=one.nbytes + other.nbytes,
        num_segments=one.num_segments + other.num_segments,
        duration=_histogram(one.duration, other.duration),
        lookup=_histogram(one.lookup, other.lookup),
        plan=_histogram(one.plan, other.plan),
        transfer=_histogram(one.transfer, other.transfer),
    )


def _waits(one: WaitStats, other: WaitStats) -> WaitStats:
    return WaitStats(one.waited_for, _histogram(one.duration, other.duration))


def _events(one: LinkEvents, other: LinkEvents) -> LinkEvents:
    return LinkEvents(one.path, one.made + other.made, one.ended + other.ended)


def _histogram(one: Histogram, other: Histogram) -> Histogram:
    counts = tuple(map(sum, zip(one.counts, other.counts, strict=True)))
    return Histogram(counts, one.total_s + other.total_s)
