"""Calls: the vectors with which `process_vm_readv` reads combs out of another process.

It looks up the pages of each vector at the source anew, which takes as long as to copy 1 KiB or
more; a vector at the destination costs a tenth of that. So teeth at the source with short gaps
between them are one vector, and what is in the gaps goes into memory that nobody looks at. A gap
lies between two teeth of one place, which is in one tensor, so nothing else than that is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from llm_datadist.core.combs import Runs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.core.combs import Combs, Teeth
    from llm_datadist.core.segments import U64

#: longer gaps are not read
MOST_WASTE_NBYTES: Final = 2048
#: the vectors of so many calls are made at once: 256 KiB of them
_CALLS: Final = 16


class Ends(NamedTuple):
    """The vectors of one comb: as many bytes at both ends."""

    src: Runs
    dst: Runs
    #: which of those at the destination are gaps, of no place
    gaps: npt.NDArray[np.intp]


def ends_of(teeth: Teeth) -> Ends:
    """Teeth with a short gap between them are one vector at the source."""
    length = np.uint64(teeth.nbytes)
    gaps = teeth.src[1:] - (teeth.src[:-1] + length)
    is_read = (gaps > 0) & (gaps <= np.uint64(MOST_WASTE_NBYTES))
    if not is_read.any():
        return Ends(teeth.src_runs, teeth.dst_runs, np.zeros(0, np.intp))
    first = np.flatnonzero(np.concatenate(([True], gaps > np.uint64(MOST_WASTE_NBYTES))))
    last = np.append(first[1:], len(teeth)) - 1
    src = Runs(teeth.src[first], teeth.src[last] + length - teeth.src[first])
    at = np.arange(len(teeth)) + np.concatenate(([0], np.cumsum(is_read)))
    offsets, nbytes = np.zeros((2, int(at[-1]) + 1), dtype=np.uint64)
    offsets[at], nbytes[at] = teeth.dst, length
    behind = at[:-1][is_read] + 1
    nbytes[behind] = gaps[is_read]
    return Ends(src, Runs(offsets, nbytes), behind)


def calls_of(
    combs: Combs, count: int, max_nbytes: int, waste_addr: int
) -> Iterator[tuple[U64, U64]]:
    """Vectors at the source, and at the destination, of several system calls at a time.

    Each call takes at most `count` vectors of either: [call, vector, 2]. The first is the caller's
    own. They are overwritten by the next. What is in gaps goes to the address of the waste, which
    is as large as the largest gap. With gaps, a call of more than one comb is of `max_nbytes` at
    most.
    """
    ends = ends_of(combs.teeth)
    fit = (count - 1) // max(len(ends.src.offsets), len(ends.dst.offsets))
    at_once = max(1, min(fit, max_nbytes // int(ends.src.nbytes.sum())))
    whole = len(combs.src) // at_once * at_once
    for first, last, width in (
        (0, whole, at_once),
        (whole, len(combs.src), len(combs.src) - whole),
    ):
        if first < last:
            src, dst = combs.src[first:last].reshape(-1, width), combs.dst[first:last]
            yield from _calls(ends, src, dst.reshape(-1, width), waste_addr)


def _calls(ends: Ends, src: U64, dst: U64, waste_addr: int) -> Iterator[tuple[U64, U64]]:
    """Of places as rows of calls."""
    tables = [_Table(runs, src[:_CALLS].shape) for runs in (ends.src, ends.dst)]
    gaps = np.add.outer(np.arange(src.shape[1]) * len(ends.dst.offsets), ends.gaps).ravel() + 1
    for start in range(0, len(src), _CALLS):
        here, there = (
            table.at(places[start : start + _CALLS])
            for table, places in zip(tables, (src, dst), strict=True)
        )
        there[:, gaps, 0] = waste_addr
        yield here, there


class _Table:
    """The vectors of some calls at one end; lengths, and offsets from places, are always the same.

    To make them anew for each call would take a tenth of what the call does.
    """

    def __init__(self, runs: Runs, shape: tuple[int, ...]) -> None:
        rows, places = shape
        self._each = len(runs.offsets)
        self._offsets = np.tile(runs.offsets, places)
        self._vectors = np.zeros((rows, 1 + len(self._offsets), 2), dtype=np.uint64)
        self._vectors[:, 1:, 1] = np.tile(runs.nbytes, places)

    def at(self, places: U64) -> U64:
        vectors = self._vectors[: len(places)]
        addrs = np.repeat(places, self._each).reshape(len(places), -1)
        np.add(addrs, self._offsets, out=vectors[:, 1:, 0])
        return vectors
