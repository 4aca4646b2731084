"""Counting: what operations did, by operation, peer and path. One recorder for each cluster.

A pull of one block takes some 30 microseconds, so what is done on its way is one append to a deque;
counters and histograms are filled from there, for many operations at once.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from llm_datadist.core.stats import BOUNDS_S, Histogram, LinkEvents, OperationStats, WaitStats
from llm_datadist.locks import make_lock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from llm_datadist.errors import LLMStatusCode

#: peers may come and go under ever new ids: those beyond so many series are counted together
_MAX_SERIES = 1024
#: operations that are counted at once; it takes about 0.1 ms
_BATCH = 256
_BOUNDS_S = np.array(BOUNDS_S)
#: when something happened that did not
NEVER: Final = float("nan")
#: when an operation, its planning and its transfer began, and when it ended, by
#: `time.perf_counter`; for how many clusters it succeeded, its bytes and segments
Record: TypeAlias = tuple[float, float, float, float, int, int, int]


class Series:
    """The counters of one operation with one peer over one path. Thread-safe."""

    def __init__(self) -> None:
        self._lock = make_lock()
        #: to be counted; threads append to it without the lock
        self._records: deque[Record] = deque()
        self._totals = np.zeros(3, dtype=np.int64)
        self._failures: Counter[str] = Counter()
        self._times = [_Times() for _ in range(4)]

    def add(self, record: Record, failures: Sequence[LLMStatusCode] = ()) -> None:
        """An operation has ended."""
        self._records.append(record)
        if failures:
            with self._lock:
                self._failures.update(status.name for status in failures)
        if len(self._records) >= _BATCH:
            with self._lock:
                self._count()

    def snapshot(self, operation: str, peer: int | None, path: str) -> OperationStats:
        with self._lock:
            self._count()
            succeeded, nbytes, num_segments = self._totals.tolist()
            return OperationStats(
                operation,
                peer,
                path,
                succeeded,
                tuple(dict(self._failures).items()),
                nbytes,
                num_segments,
                *(times.snapshot() for times in self._times),
            )

    def _count(self) -> None:
        """What was recorded so far; the lock is held."""
        records = [self._records.popleft() for _ in range(len(self._records))]
        if not records:
            return
        columns = np.array(records, dtype=np.float64).T
        self._totals += columns[4:].sum(axis=1).astype(np.int64)
        begun, planning, moving, ended = columns[:4]
        phases = (ended - begun, planning - begun, moving - planning, ended - moving)
        for times, seconds in zip(self._times, phases, strict=True):
            times.add(seconds)


class Recorder:
    """Counters and histograms. Thread-safe."""

    def __init__(self) -> None:
        self._lock = make_lock()
        self._series: dict[tuple[str, int | None, str], Series] = {}
        self._waits: dict[str, _Times] = {}
        self._made: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()

    def series(self, operation: str, peer: int | None, path: str) -> Series:
        """Where such operations are counted."""
        return self._series.get((operation, peer, path)) or self._new(operation, peer, path)

    def link_made(self, path: str) -> None:
        with self._lock:
            self._made[path] += 1

    def link_ended(self, path: str) -> None:
        with self._lock:
            self._ended[path] += 1

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Times a wait, however it ends."""
        begun_at = time.perf_counter()
        try:
            yield
        finally:
            took_s = time.perf_counter() - begun_at
            with self._lock:
                self._waits.setdefault(what, _Times()).add(np.array([took_s]))

    def operations(self) -> tuple[OperationStats, ...]:
        with self._lock:
            every = dict(self._series)
        return tuple(series.snapshot(*name) for name, series in every.items())

    def waits(self) -> tuple[WaitStats, ...]:
        with self._lock:
            return tuple(WaitStats(what, times.snapshot()) for what, times in self._waits.items())

    def link_events(self) -> tuple[LinkEvents, ...]:
        with self._lock:
            return tuple(LinkEvents(path, n, self._ended[path]) for path, n in self._made.items())

    def _new(self, operation: str, peer: int | None, path: str) -> Series:
        with self._lock:
            if len(self._series) >= _MAX_SERIES:
                peer = None
            return self._series.setdefault((operation, peer, path), Series())


class _Times:
    """A histogram that is being filled."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(BOUNDS_S) + 1, dtype=np.int64)
        self._total_s = 0.0

    def add(self, seconds: npt.NDArray[np.float64]) -> None:
        """Passes over what is NEVER."""
        seconds = seconds[~np.isnan(seconds)]
        buckets = np.searchsorted(_BOUNDS_S, seconds)
        self._counts += np.bincount(buckets, minlength=len(self._counts))
        self._total_s += float(seconds.sum())

    def snapshot(self) -> Histogram:
        return Histogram(tuple(self._counts.tolist()), self._total_s)
