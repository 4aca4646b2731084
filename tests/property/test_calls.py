"""Calls of combs, carried out as the kernel would: pieces arrive, gaps go to the waste alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist.core.calls import MOST_WASTE_NBYTES, calls_of
from llm_datadist.core.combs import Combs, Teeth

if TYPE_CHECKING:
    from llm_datadist.core.segments import U64

#: where the destination and the waste lie
DST, WASTE = 2**40, 2**50
#: vectors that a call takes
MOST_VECTORS = 12


@st.composite
def combs(draw: st.DrawFn) -> Combs:
    """Up to 6 teeth with gaps of all kinds at some places, in some order at the destination."""
    nbytes = draw(st.integers(1, 40))
    gaps = draw(
        st.lists(st.sampled_from([0, 1, 7, MOST_WASTE_NBYTES, MOST_WASTE_NBYTES + 1]), max_size=5)
    )
    src = np.concatenate(([0], np.cumsum(np.array(gaps, np.int64) + nbytes)))
    order = draw(st.permutations(range(len(src))))
    step = nbytes + draw(st.sampled_from([0, 3]))
    dst = np.array(order) * step
    count = draw(st.sampled_from([1, 2, 5, 90]))
    return Combs(
        (np.array(draw(st.permutations(range(count)))) * (int(src[-1]) + 999)).astype(np.uint64),
        (np.arange(count) * (len(dst) * step) + DST).astype(np.uint64),
        Teeth(src.astype(np.uint64), dst.astype(np.uint64), nbytes),
    )


def bytes_at(vectors: U64) -> U64:
    """The addresses of all bytes of the vectors, in order."""
    return np.concatenate([np.arange(addr, addr + n, dtype=np.uint64) for addr, n in vectors])


@settings(deadline=None)
@given(combs(), st.sampled_from([1, 5000, 2**20]))
def test_calls_move_the_pieces_and_waste_what_is_between_them(
    pieces: Combs, max_nbytes: int
) -> None:
    moved = []
    starts = np.sort(pieces.src)
    span = pieces.teeth.src[-1] + np.uint64(pieces.teeth.nbytes)
    for sources, destinations in calls_of(pieces, MOST_VECTORS, max_nbytes, WASTE):
        assert len(sources) == len(destinations)
        assert max(sources.shape[1], destinations.shape[1]) <= MOST_VECTORS
        for theirs, ours in zip(sources[:, 1:], destinations[:, 1:], strict=True):
            inside = theirs[:, 0] - starts[np.searchsorted(starts, theirs[:, 0], "right") - 1]
            assert (inside + theirs[:, 1] <= span).all(), "between places"
            assert int(theirs[:, 1].sum()) <= max(max_nbytes, int(span))
            assert ours[ours[:, 0] == WASTE, 1].max(initial=0) <= MOST_WASTE_NBYTES
            moved.append(np.stack((bytes_at(theirs), bytes_at(ours))))
    flat = pieces.flat()
    ends = [bytes_at(np.stack((end, flat.nbytes), 1)) for end in (flat.src, flat.dst)]
    src, dst = np.concatenate(moved, axis=1)
    assert sorted(zip(*ends, strict=True)) == sorted(
        zip(src[dst < WASTE], dst[dst < WASTE], strict=True)
    )


def test_only_short_gaps_are_read() -> None:
    teeth = Teeth(
        np.array([0, 256, 600, 5000], np.uint64), np.array([0, 256, 900, 800], np.uint64), 100
    )
    combs = Combs(np.array([1000], np.uint64), np.array([DST], np.uint64), teeth)
    ((sources, destinations),) = calls_of(combs, MOST_VECTORS, 2**20, WASTE)
    assert sources[0, 1:].tolist() == [[1000, 700], [6000, 100]]
    assert destinations[0, 1:].tolist() == [
        *([DST, 100], [WASTE, 156], [DST + 256, 100], [WASTE, 244]),
        *([DST + 900, 100], [DST + 800, 100]),
    ]
