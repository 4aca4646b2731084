"""Segments: what a transfer moves, as numpy columns from the plan to the system call."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, TypeAlias, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.core.geometry import U64

#: so many segments or fewer are planned and moved as lists
FEW: Final = 16
Lists: TypeAlias = tuple[list[int], list[int], list[int]]


@final
class Segments:
    """Byte ranges to copy: `nbytes[i]` from address `src[i]` to address `dst[i]`.

    Which of the two addresses lies in another process is up to the operation:
    a read's `src` is remote, a write's `dst` is. Immutable. A few segments are cheaper as lists of
    Python's ints than as columns: each form is made from the other when it is asked for.
    """

    __slots__ = ("_columns", "_lists")

    def __init__(self, src: U64, dst: U64, nbytes: U64) -> None:
        self._columns: tuple[U64, U64, U64] | None = (src, dst, nbytes)
        self._lists: Lists | None = None

    @classmethod
    def few(cls, src: list[int], dst: list[int], nbytes: list[int]) -> Segments:
        """The same from lists."""
        segments = cls.__new__(cls)
        segments._columns, segments._lists = None, (src, dst, nbytes)
        return segments

    @property
    def src(self) -> U64:
        return self.columns[0]

    @property
    def dst(self) -> U64:
        return self.columns[1]

    @property
    def nbytes(self) -> U64:
        return self.columns[2]

    @property
    def columns(self) -> tuple[U64, U64, U64]:
        """Sources, destinations, lengths."""
        if self._columns is None:
            src, dst, nbytes = (np.array(each, dtype=np.uint64) for each in self.lists)
            self._columns = (src, dst, nbytes)
        return self._columns

    @property
    def lists(self) -> Lists:
        """Sources, destinations, lengths."""
        if self._lists is None:
            src, dst, nbytes = self.columns
            self._lists = (src.tolist(), dst.tolist(), nbytes.tolist())
        return self._lists

    def __len__(self) -> int:
        return len((self._lists or self.columns)[2])

    @property
    def total_nbytes(self) -> int:
        return int(self.nbytes.sum()) if self._lists is None else sum(self._lists[2])

    def slice(self, start: int, stop: int) -> Segments:
        return Segments(self.src[start:stop], self.dst[start:stop], self.nbytes[start:stop])

    def windows(self, count: int) -> Iterator[Segments]:
        """So many segments after the other; one empty window where there are none."""
        for start in range(0, max(1, len(self)), count):
            yield self.slice(start, start + count)

    def coalesced(self) -> Segments:
        """The same bytes with neighbours that touch on both sides merged."""
        if len(self) < 2:
            return self
        touches = (self.src[1:] == self.src[:-1] + self.nbytes[:-1]) & (
            self.dst[1:] == self.dst[:-1] + self.nbytes[:-1]
        )
        if not touches.any():
            return self
        first = np.flatnonzero(np.concatenate(([True], ~touches)))
        return Segments(self.src[first], self.dst[first], np.add.reduceat(self.nbytes, first))

    def bounded(self, max_nbytes: int) -> Segments:
        """The same bytes in pieces of at most `max_nbytes`, so that deadlines are kept."""
        if not len(self) or int(self.nbytes.max()) <= max_nbytes:
            return self
        limit = np.uint64(max_nbytes)
        pieces = (self.nbytes + limit - np.uint64(1)) // limit
        owner = np.repeat(np.arange(len(self)), pieces.astype(np.int64))
        first = np.concatenate(([0], np.cumsum(pieces)[:-1])).astype(np.int64)
        offset = (np.arange(len(owner)) - first[owner]).astype(np.uint64) * limit
        nbytes = np.minimum(self.nbytes[owner] - offset, limit)
        return Segments(self.src[owner] + offset, self.dst[owner] + offset, nbytes)

    def split(self, parts: int) -> list[Segments]:
        """Consecutive parts of about equal bytes, at most `parts` of them, none empty."""
        if parts <= 1 or len(self) <= 1:
            return [self] if len(self) else []
        ends = np.cumsum(self.nbytes)
        goals = ends[-1] / parts * np.arange(1, parts)
        cut = np.searchsorted(ends, goals)
        nearer_behind = ends[cut] - goals <= goals - (ends[cut] - self.nbytes[cut])
        cuts = cut + nearer_behind
        bounds = np.concatenate(([0], cuts, [len(self)]))
        bounds = bounds[np.diff(bounds, prepend=-1) > 0]  # np.unique would load numpy.ma
        return [self.slice(int(start), int(stop)) for start, stop in itertools.pairwise(bounds)]


def iovecs(
    addrs: U64,
    nbytes: U64,
    before: Sequence[tuple[int, int]] = (),
    behind: Sequence[tuple[int, int]] = (),
) -> U64:
    """The columns as an array of `struct iovec` (address, length), C-contiguous.

    More vectors may come before and behind them.
    """
    if len(addrs) <= FEW:
        pairs = zip(addrs.tolist(), nbytes.tolist(), strict=True)
        flat = list(itertools.chain.from_iterable((*before, *pairs, *behind)))
        return np.array(flat, dtype=np.uint64).reshape(-1, 2)
    first, last = len(before), len(before) + len(addrs)
    vectors = np.empty((last + len(behind), 2), dtype=np.uint64)
    vectors[first:last, 0] = addrs
    vectors[first:last, 1] = nbytes
    if before:
        vectors[:first] = before
    if behind:
        vectors[last:] = behind
    return vectors


def first_unfinished(nbytes: U64, moved: int) -> int:
    """The first of these lengths that a call which moved `moved` bytes did not finish."""
    return int(np.searchsorted(np.cumsum(nbytes), np.uint64(moved), side="right"))


def skip_bytes(vectors: U64, nbytes: int, window: int) -> U64:
    """What is left of iovecs after a call on the first `window` of them moved `nbytes`.

    A view: the first vector left is changed in place when it was moved in part.
    """
    ends = np.cumsum(vectors[:window, 1])
    done = int(np.searchsorted(ends, np.uint64(nbytes), side="right"))
    left = vectors[done:]
    used = np.uint64(nbytes) - (ends[done - 1] if done else np.uint64(0))
    if used:
        left[0, 0] += used
        left[0, 1] -= used
    return left
