"""Combs: small pieces that lie alike at each of many places.

Where heads are split, or two layouts have other orders, a block goes in pieces as small as one head
of one token. They lie alike in every block, so they are kept once, as *teeth*, beside columns of
places; memory and time are those of the places. Teeth that touch at one end are one *run* there,
whatever they are at the other: each end is asked for its runs, and the bytes go from the one
sequence into the other. Teeth are in the order of the source, so that its runs are as long as can
be: a remote vector costs many times what a local one does (docs/layouts.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, final

import numpy as np

from llm_datadist.core.segments import ANY_NBYTES, U64, Segments, Vectors, iovecs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.core.tiled import Tiled

#: one comb has no more teeth than fit into a system call with much else, …
MOST_TEETH: Final = 512
#: … and no more bytes, so that streams share them evenly
MOST_NBYTES: Final = 256 * 1024


class Runs(NamedTuple):
    """Where the bytes of a comb lie at one end, in their order: offsets and lengths."""

    offsets: U64
    nbytes: U64

    @classmethod
    def of(cls, offsets: U64, nbytes: int) -> Runs:
        """Of teeth that are equally long: those that touch are one."""
        starts = np.flatnonzero(np.diff(offsets, prepend=offsets[:1]) != np.uint64(nbytes))
        counts = np.diff(starts, append=len(offsets)).astype(np.uint64)
        return cls(offsets[starts], counts * np.uint64(nbytes))

    def at(self, places: U64, before: Vectors, behind: Vectors) -> U64:
        """All runs at all places, as `segments.iovecs` makes them."""
        addrs = np.add.outer(places, self.offsets).ravel()
        return iovecs(addrs, np.tile(self.nbytes, len(places)), before, behind)


@dataclass(frozen=True, eq=False)
class Teeth:
    """Offsets of equally long pieces from a comb's place, at both ends; in the source's order."""

    src: U64
    dst: U64
    nbytes: int

    @classmethod
    def of(cls, src: U64, dst: U64, nbytes: int) -> Teeth:
        """From offsets in any order; those before the place are large, as unsigned numbers go."""
        order = np.argsort(src.view(np.int64), kind="stable")
        return cls(src[order], dst[order], nbytes)

    def __len__(self) -> int:
        return len(self.src)

    def chunks(self, count: int) -> Iterator[Teeth]:
        """In order, of at most `count` teeth, and of no more than a comb has."""
        at_once = max(1, min(count, MOST_TEETH, MOST_NBYTES // self.nbytes))
        if len(self) <= at_once:
            yield self
            return
        for start in range(0, len(self), at_once):
            stop = start + at_once
            yield Teeth(self.src[start:stop], self.dst[start:stop], self.nbytes)

    def from_lowest(self) -> tuple[np.uint64, np.uint64, Teeth]:
        """The lowest offset at either end, and the same teeth by their offsets from there."""
        src, dst = (each.view(np.int64).min().view(np.uint64) for each in (self.src, self.dst))
        return src, dst, Teeth(self.src - src, self.dst - dst, self.nbytes)

    @cached_property
    def src_runs(self) -> Runs:
        return Runs.of(self.src, self.nbytes)

    @cached_property
    def dst_runs(self) -> Runs:
        return Runs.of(self.dst, self.nbytes)


@final
class Combs:
    """Byte ranges to copy, as `Segments`: each tooth at each place. Immutable."""

    __slots__ = ("dst", "src", "teeth")

    def __init__(self, src: U64, dst: U64, teeth: Teeth) -> None:
        """`src` and `dst` are the addresses of the places."""
        self.src, self.dst, self.teeth = src, dst, teeth

    def __len__(self) -> int:
        """Of pieces."""
        return len(self.src) * len(self.teeth)

    @property
    def total_nbytes(self) -> int:
        return len(self) * self.teeth.nbytes

    def src_iovecs(self, before: Vectors = (), behind: Vectors = ()) -> U64:
        """As of `Segments`."""
        return self.teeth.src_runs.at(self.src, before, behind)

    def dst_iovecs(self, before: Vectors = (), behind: Vectors = ()) -> U64:
        """As of `Segments`."""
        return self.teeth.dst_runs.at(self.dst, before, behind)

    def from_lowest(self) -> Combs:
        """The same pieces; each place is where its first byte lies, at either end."""
        src, dst, teeth = self.teeth.from_lowest()
        return Combs(self.src + src, self.dst + dst, teeth)

    def landing(self) -> Segments:
        """As of `Segments`: at each place all that lies between its first byte and its last."""
        combs = self.from_lowest()
        nbytes = combs.teeth.dst.max() + np.uint64(combs.teeth.nbytes)
        return Segments(combs.dst, combs.dst, np.full(len(combs.dst), nbytes))

    def flat(self) -> Segments:
        """The same pieces, each of them a segment."""
        src = np.add.outer(self.src, self.teeth.src).ravel()
        dst = np.add.outer(self.dst, self.teeth.dst).ravel()
        return Segments(src, dst, np.full(len(self), self.teeth.nbytes, np.uint64))

    def bounded(self, max_nbytes: int) -> Segments | Combs:
        """As `Segments.bounded`."""
        is_small = len(self.teeth) * self.teeth.nbytes <= max_nbytes
        return self if is_small else self.flat().bounded(max_nbytes)

    def windows(self, count: int, max_nbytes: int = ANY_NBYTES) -> Iterator[Combs]:
        """So many pieces, and bytes, at a time, or fewer; one comb at least."""
        nbytes = len(self.teeth) * self.teeth.nbytes
        at_once = max(1, min(count // len(self.teeth), max_nbytes // nbytes))
        for start in range(0, len(self.src), at_once):
            yield self._slice(start, start + at_once)

    def split(self, parts: int) -> list[Segments | Combs]:
        """As `Segments.split`."""
        bounds = [len(self.src) * part // parts for part in range(parts + 1)]
        return [self._slice(*pair) for pair in pairwise(bounds) if pair[0] < pair[1]]

    def _slice(self, start: int, stop: int) -> Combs:
        return Combs(self.src[start:stop], self.dst[start:stop], self.teeth)


#: what a channel is asked to read
Pieces: TypeAlias = "Segments | Tiled | Combs"


def overlap(one: Pieces, other: Pieces) -> bool:
    """Whether a byte of the one's destination is one of the other's.

    Ranks that fill one cache have their heads between each other's: that takes a closer look.
    """
    return one.landing().overlap(other.landing()) and one.flat().overlap(other.flat())
