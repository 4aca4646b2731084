"""Ranges: memory by its addresses, in one process. Which of it holds these pieces?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from llm_datadist.core.geometry import CacheKind, Geometry, Layout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llm_datadist.core.segments import U64

Ids = npt.NDArray[np.int64]
#: the id of no memory: caches have positive ones
NOWHERE: Final = 0


class Ranges:
    """Memory of caches, by address; ranges may overlap. Immutable.

    A piece lies in a range or not; two ranges that touch are two.
    """

    def __init__(self, ranges: Iterable[tuple[int, int, int]] = ()) -> None:
        """Each is an address, a length and the id of its cache."""
        rows = sorted(ranges)
        columns: list[list[int]] = [list(column) for column in zip(*rows, strict=True)]
        addrs, nbytes, ids = columns or ([], [], [])
        # the last byte, not the first behind it, which may be no number of 64 bits
        self._starts = np.array(addrs, dtype=np.uint64)
        lasts = self._starts + np.array([each - 1 for each in nbytes], dtype=np.uint64)
        # of all that begin at an address or before it, the one that ends last holds what any does
        self._lasts = np.maximum.accumulate(lasts)
        is_new = np.ones(len(rows), dtype=bool)
        is_new[1:] = self._lasts[1:] > self._lasts[:-1]
        longest = np.maximum.accumulate(np.where(is_new, np.arange(len(rows)), 0))
        self._ids: Ids = np.array(ids, dtype=np.int64)[longest]

    def __len__(self) -> int:
        return len(self._starts)

    def find(self, addrs: U64, nbytes: U64) -> Ids:
        """The cache that holds each piece, NOWHERE where none does. Lengths are 1 or more."""
        found: Ids = np.full(len(addrs), NOWHERE, dtype=np.int64)
        if len(self):
            index = np.searchsorted(self._starts, addrs, side="right") - 1
            room = self._lasts[np.maximum(index, 0)]
            # without a sum, which could be beyond 64 bits
            is_held = (index >= 0) & (addrs <= room)
            is_held &= nbytes - np.uint64(1) <= np.where(is_held, room - addrs, 0)
            found[is_held] = self._ids[index[is_held]]
        return found


@dataclass(frozen=True, slots=True, eq=False)
class PushedLayout(Layout):
    """Pieces of memory of which a peer may have these bytes, and no others."""

    ranges: Ranges

    @classmethod
    def of(cls, addrs: U64, nbytes: U64) -> PushedLayout:
        """Pieces that touch or overlap are one."""
        order = np.argsort(addrs, kind="stable")
        starts, ends = addrs[order], (addrs + nbytes)[order]
        furthest = np.maximum.accumulate(ends)
        first = np.flatnonzero(np.concatenate(([True], starts[1:] > furthest[:-1])))
        last = np.append(first[1:], len(starts)) - 1
        starts, lengths = starts[first], furthest[last] - starts[first]
        ranges = zip(starts.tolist(), lengths.tolist(), [1] * len(first), strict=True)
        total = int(lengths.sum())
        return cls(Geometry(CacheKind.CONTINUOUS, 1, 1, total), starts[:1], Ranges(ranges))

    def covers(self, addrs: U64, nbytes: U64) -> bool:
        """Whether every piece lies within one of those."""
        is_something = nbytes > 0
        found = self.ranges.find(addrs[is_something], nbytes[is_something])
        return bool((found != NOWHERE).all())
