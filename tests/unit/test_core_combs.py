"""Combs: what the kernel is asked for at either end. That plans are right: tests/property."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.core.combs import MOST_NBYTES, MOST_TEETH, Combs, Teeth

if TYPE_CHECKING:
    from llm_datadist.core.segments import U64


def column(*values: int) -> U64:
    return np.array(values, dtype=np.uint64)


def steps(count: int, step: int) -> U64:
    return np.arange(count, dtype=np.uint64) * np.uint64(step)


#: of two places, whose teeth touch at the source
COMBS = Combs(column(1000, 5000), column(70000, 20000), Teeth(steps(4, 8), steps(4, 100), 8))


def test_teeth_that_touch_at_one_end_are_one_vector_there() -> None:
    assert COMBS.src_iovecs().tolist() == [[1000, 32], [5000, 32]]
    assert COMBS.dst_iovecs()[:, 0].tolist() == [
        *(70000, 70100, 70200, 70300),
        *(20000, 20100, 20200, 20300),
    ]
    assert set(COMBS.dst_iovecs()[:, 1].tolist()) == {8}
    assert (len(COMBS), COMBS.total_nbytes) == (8, 64)


def test_other_vectors_come_before_and_behind() -> None:
    assert COMBS.src_iovecs([(1, 2)], [(3, 4), (5, 6)]).tolist() == [
        *([1, 2], [1000, 32], [5000, 32], [3, 4], [5, 6])
    ]


def test_teeth_are_in_the_order_of_the_source() -> None:
    teeth = Teeth.of(column(16, 0, 8), column(0, 50, 100), 8)
    assert (teeth.src.tolist(), teeth.dst.tolist()) == ([0, 8, 16], [50, 100, 0])
    assert [part.tolist() for part in teeth.src_runs] == [[0], [24]]


def test_flat_they_are_segments() -> None:
    assert COMBS.flat().lists == (
        [1000, 1008, 1016, 1024, 5000, 5008, 5016, 5024],
        [70000, 70100, 70200, 70300, 20000, 20100, 20200, 20300],
        [8] * 8,
    )


def test_windows_and_parts_have_whole_combs() -> None:
    assert [len(window) for window in COMBS.windows(7)] == [4, 4]
    assert [len(window) for window in COMBS.windows(8, 32)] == [4, 4]
    assert [len(window) for window in COMBS.windows(8)] == [8]
    assert [len(part) for part in COMBS.split(5)] == [4, 4]


def test_what_is_larger_than_a_bound_is_cut() -> None:
    assert COMBS.bounded(32) is COMBS
    assert COMBS.bounded(31).flat().lists == COMBS.flat().lists
    assert COMBS.bounded(5).flat().nbytes.tolist() == [5, 3] * 8


def test_a_comb_has_no_more_teeth_and_bytes_than_it_may() -> None:
    many = Teeth(steps(MOST_TEETH + 1, 8), steps(MOST_TEETH + 1, 100), 8)
    assert [len(part) for part in many.chunks(10**6)] == [MOST_TEETH, 1]
    large = Teeth(steps(3, 2 * MOST_NBYTES), steps(3, 2 * MOST_NBYTES), MOST_NBYTES // 2 + 1)
    assert [len(part) for part in large.chunks(10**6)] == [1, 1, 1]
