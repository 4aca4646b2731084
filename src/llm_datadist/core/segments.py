"""Segments: what a transfer moves, as numpy columns from the plan to the system call."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, TypeAlias, final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: a column of addresses or lengths
U64 = npt.NDArray[np.uint64]

ANY_NBYTES: Final = 2**64
#: so many segments or fewer are planned and moved as lists
FEW: Final = 16
#: segments that are listed at a time, or more, where they are asked for
AT_ONCE: Final = 2**13
#: a few addresses and lengths
Vectors: TypeAlias = "Sequence[tuple[int, int]]"
Lists: TypeAlias = tuple[list[int], list[int], list[int]]


@final
class Segments:
    """Byte ranges to copy: `nbytes[i]` from address `src[i]` to address `dst[i]`.

    Which of the two addresses lies in another process is up to the operation: a read's `src` is
    remote, a write's `dst` is. Immutable. A few segments are cheaper as `lists` of Python's ints
    than as columns: each form is made from the other when it is first asked for.
    """

    __slots__ = ("_count", "dst", "lists", "nbytes", "src", "total_nbytes")

    src: U64
    dst: U64
    nbytes: U64
    #: sources, destinations, lengths
    lists: Lists
    total_nbytes: int

    def __init__(self, src: U64, dst: U64, nbytes: U64) -> None:
        self.src, self.dst, self.nbytes = src, dst, nbytes
        self._count = len(nbytes)

    @classmethod
    def few(cls, src: list[int], dst: list[int], nbytes: list[int]) -> Segments:
        """The same from lists."""
        segments = cls.__new__(cls)
        segments.lists = (src, dst, nbytes)
        segments._count, segments.total_nbytes = len(nbytes), sum(nbytes)
        return segments

    def __getattr__(self, name: str) -> object:
        """The form that was not there yet; a form that is costs no call."""
        if name == "lists":
            self.lists = (self.src.tolist(), self.dst.tolist(), self.nbytes.tolist())
        elif name == "total_nbytes":
            self.total_nbytes = int(self.nbytes.sum())
        elif name in ("src", "dst", "nbytes"):
            src, dst, nbytes = (np.array(each, dtype=np.uint64) for each in self.lists)
            self.src, self.dst, self.nbytes = src, dst, nbytes
        return object.__getattribute__(self, name)

    def __len__(self) -> int:
        return self._count

    def src_iovecs(self, before: Vectors = (), behind: Vectors = ()) -> U64:
        """What the kernel is given for the source: see `iovecs`."""
        if self._count <= FEW:
            return _few_iovecs(self.lists[0], self.lists[2], before, behind)
        return iovecs(self.src, self.nbytes, before, behind)

    def dst_iovecs(self, before: Vectors = (), behind: Vectors = ()) -> U64:
        """The same for the destination: as many bytes, though not always as many vectors."""
        if self._count <= FEW:
            return _few_iovecs(self.lists[1], self.lists[2], before, behind)
        return iovecs(self.dst, self.nbytes, before, behind)

    def landing(self) -> Segments:
        """What must lie within one tensor each, for a copy to reach no further: as destinations."""
        return self

    def flat(self) -> Segments:
        return self

    def overlap(self, other: Segments) -> bool:
        """Whether a byte of the other's destination is one of this one's."""
        if not len(self) or not len(other) or self._ends_before(other) or other._ends_before(self):
            return False
        starts = np.concatenate((self.dst, other.dst))
        ends = np.concatenate((self.dst + self.nbytes, other.dst + other.nbytes))
        is_other = np.arange(len(starts)) >= len(self)
        order = np.argsort(starts, kind="stable")
        starts, ends, is_other = starts[order], ends[order], is_other[order]
        latest = [
            np.maximum.accumulate(np.where(is_other == who, ends, 0)) for who in (False, True)
        ]
        before = np.where(is_other[1:], latest[0][:-1], latest[1][:-1])
        return bool((before > starts[1:]).any())

    def _ends_before(self, other: Segments) -> bool:
        """Whether all of this one's destination lies below the other's."""
        return bool((self.dst + self.nbytes).max() <= other.dst.min())

    def slice(self, start: int, stop: int) -> Segments:
        return Segments(self.src[start:stop], self.dst[start:stop], self.nbytes[start:stop])

    def windows(self, count: int, max_nbytes: int = ANY_NBYTES) -> Iterator[Segments]:
        """So many segments after the other; one empty window where there are none.

        Or fewer, so that they are at most so many bytes; one at least.
        """
        if max_nbytes < ANY_NBYTES:
            count = min(count, max(1, max_nbytes // int(self.nbytes.max(initial=1))))
        if self._count <= count:
            yield self
            return
        for start in range(0, self._count, count):
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
        if not self._count or int(self.nbytes.max()) <= max_nbytes:
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
        if parts <= 1 or self._count <= 1:
            return [self] if self._count else []
        ends = np.cumsum(self.nbytes)
        goals = ends[-1] / parts * np.arange(1, parts)
        cut = np.searchsorted(ends, goals)
        nearer_behind = ends[cut] - goals <= goals - (ends[cut] - self.nbytes[cut])
        cuts = cut + nearer_behind
        bounds = np.concatenate(([0], cuts, [len(self)]))
        bounds = bounds[np.diff(bounds, prepend=-1) > 0]  # np.unique would load numpy.ma
        return [self.slice(int(start), int(stop)) for start, stop in itertools.pairwise(bounds)]


def listed(src: U64, dst: U64, strips: Segments) -> Segments:
    """Each strip at each place: the strips' addresses are offsets from there."""
    return Segments(
        np.add.outer(src, strips.src).ravel(),
        np.add.outer(dst, strips.dst).ravel(),
        np.tile(strips.nbytes, len(src)),
    )


def iovecs(
    addrs: U64,
    nbytes: U64,
    before: Vectors = (),
    behind: Vectors = (),
) -> U64:
    """The columns as an array of `struct iovec` (address, length), C-contiguous.

    More vectors may come before and behind them.
    """
    if len(addrs) <= FEW:
        return _few_iovecs(addrs.tolist(), nbytes.tolist(), before, behind)
    first, last = len(before), len(before) + len(addrs)
    vectors = np.empty((last + len(behind), 2), dtype=np.uint64)
    vectors[first:last, 0] = addrs
    vectors[first:last, 1] = nbytes
    if before:
        vectors[:first] = before
    if behind:
        vectors[last:] = behind
    return vectors


def _few_iovecs(addrs: list[int], nbytes: list[int], before: Vectors, behind: Vectors) -> U64:
    pairs = zip(addrs, nbytes, strict=True)
    flat = list(itertools.chain.from_iterable((*before, *pairs, *behind)))
    return np.array(flat, dtype=np.uint64).reshape(-1, 2)


def total_of(nbytes: U64) -> int:
    """The sum of lengths, whatever somebody says that they are."""
    if len(nbytes) <= FEW:
        return sum(nbytes.tolist())
    half = np.uint64(32)  # the sum of either half does not wrap
    return (int((nbytes >> half).sum()) << 32) + int((nbytes & np.uint64(2**32 - 1)).sum())


def joined(vectors: U64) -> U64:
    """Vectors with neighbours that touch merged."""
    ends = vectors[:, 0] + vectors[:, 1]
    starts = np.flatnonzero(np.concatenate(([True], ends[:-1] != vectors[1:, 0])))
    if len(starts) == len(vectors):
        return vectors
    merged = vectors[starts]
    merged[:, 1] = np.add.reduceat(vectors[:, 1], starts)
    return merged


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
