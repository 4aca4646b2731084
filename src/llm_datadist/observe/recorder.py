"""Counting: what operations did, by operation, peer and path. One recorder for each engine."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeAlias

from llm_datadist.core.stats import BOUNDS_S, Histogram, LinkEvents, OperationStats, WaitStats

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.errors import LLMStatusCode

#: peers may come and go under ever new ids: those beyond so many series are counted together
_MAX_SERIES = 4096


#: seconds: of the whole, the look-up, the plan, the transfer; None for what was not reached
Phases: TypeAlias = tuple[float | None, float | None, float | None, float | None]
UNTIMED: Final[Phases] = (None, None, None, None)


class Recorder:
    """Counters and histograms. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._series: dict[tuple[str, int | None, str], _Series] = {}
        self._waits: defaultdict[str, _Times] = defaultdict(_Times)
        self._links: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])

    def add(
        self,
        operation: str,
        peer: int | None,
        path: str,
        failures: Sequence[LLMStatusCode],
        phases: Phases,
        *,
        succeeded: int = 1,
        nbytes: int = 0,
        num_segments: int = 0,
    ) -> None:
        """An operation has ended; one that concerns several clusters has an outcome for each."""
        with self._lock:
            series = self._series.get((operation, peer, path)) or self._new(operation, peer, path)
            series.succeeded += succeeded
            for status in failures:
                series.failures[status.name] += 1
            series.nbytes += nbytes
            series.num_segments += num_segments
            for times, seconds in zip(series.times, phases, strict=True):
                if seconds is not None:  # not by `times.add`: this is in the way of every pull
                    times.counts[bisect_left(BOUNDS_S, seconds)] += 1
                    times.total_s += seconds

    def link_made(self, path: str) -> None:
        with self._lock:
            self._links[path][0] += 1

    def link_ended(self, path: str) -> None:
        with self._lock:
            self._links[path][1] += 1

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Times a wait, however it ends."""
        begun_at = time.perf_counter()
        try:
            yield
        finally:
            took_s = time.perf_counter() - begun_at
            with self._lock:
                self._waits[what].add(took_s)

    def operations(self) -> tuple[OperationStats, ...]:
        with self._lock:
            return tuple(series.snapshot(*name) for name, series in self._series.items())

    def waits(self) -> tuple[WaitStats, ...]:
        with self._lock:
            return tuple(WaitStats(what, times.snapshot()) for what, times in self._waits.items())

    def link_events(self) -> tuple[LinkEvents, ...]:
        with self._lock:
            return tuple(LinkEvents(path, *counts) for path, counts in self._links.items())

    def _new(self, operation: str, peer: int | None, path: str) -> _Series:
        if len(self._series) >= _MAX_SERIES:
            peer = None
        return self._series.setdefault((operation, peer, path), _Series())


class _Times:
    """A histogram that is being filled."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def snapshot(self) -> Histogram:
        return Histogram(tuple(self.counts), self.total_s)


class _Series:
    """The counters of one operation with one peer over one path."""

    __slots__ = ("failures", "nbytes", "num_segments", "succeeded", "times")

    def __init__(self) -> None:
        self.succeeded = self.nbytes = self.num_segments = 0
        self.failures: defaultdict[str, int] = defaultdict(int)
        #: one for each of Phases
        self.times = (_Times(), _Times(), _Times(), _Times())

    def snapshot(self, operation: str, peer: int | None, path: str) -> OperationStats:
        return OperationStats(
            operation,
            peer,
            path,
            self.succeeded,
            tuple(self.failures.items()),
            self.nbytes,
            self.num_segments,
            *(times.snapshot() for times in self.times),
        )
