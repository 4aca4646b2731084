"""core.segments by example."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from llm_datadist.core.segments import FEW, Segments, iovecs, skip_bytes, total_of


def column(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


NOTHING = Segments(column(), column(), column())


def test_no_segments_stay_none_whatever_is_done_to_them() -> None:
    assert [len(NOTHING.coalesced()), len(NOTHING.bounded(1)), NOTHING.total_nbytes] == [0, 0, 0]


@pytest.mark.parametrize("parts", [1, 4])
def test_no_segments_split_into_no_parts(parts: int) -> None:
    assert NOTHING.split(parts) == []


def test_the_total_is_exact_beyond_the_precision_of_a_float() -> None:
    segments = Segments(column(0, 0), column(0, 0), column(2**53, 1))
    assert segments.total_nbytes == 2**53 + 1


def test_a_slice_is_a_run_of_whole_segments() -> None:
    part = Segments(column(1, 2, 3), column(4, 5, 6), column(7, 8, 9)).slice(1, 3)
    assert [part.src.tolist(), part.dst.tolist(), part.nbytes.tolist()] == [[2, 3], [5, 6], [8, 9]]


def test_segments_that_touch_on_one_side_only_stay_apart() -> None:
    segments = Segments(column(0, 8, 17), column(100, 109, 117), column(8, 8, 8))
    assert segments.coalesced().nbytes.tolist() == [8, 8, 8]


def test_a_long_run_becomes_one_segment() -> None:
    steps = np.arange(1000, dtype=np.uint64) * np.uint64(8)
    merged = Segments(steps, steps + np.uint64(2**40), np.full(1000, 8, np.uint64)).coalesced()
    assert [merged.src.tolist(), merged.dst.tolist(), merged.nbytes.tolist()] == [
        [0],
        [2**40],
        [8000],
    ]


def test_a_limit_cuts_a_segment_into_pieces_and_a_rest() -> None:
    pieces = Segments(column(10, 50), column(70, 90), column(7, 2)).bounded(3)
    assert pieces.src.tolist() == [10, 13, 16, 50]
    assert pieces.dst.tolist() == [70, 73, 76, 90]
    assert pieces.nbytes.tolist() == [3, 3, 1, 2]


def test_parts_are_equal_in_bytes_and_not_in_segments() -> None:
    segments = Segments(column(0, 1, 2, 3, 4), column(0, 1, 2, 3, 4), column(10, 10, 10, 10, 40))
    assert [part.nbytes.tolist() for part in segments.split(2)] == [[10, 10, 10, 10], [40]]


def test_iovecs_skip_those_that_were_moved_whole() -> None:
    left = skip_bytes(iovecs(column(100, 200, 300), column(5, 5, 5)), 10, window=8)
    assert left.tolist() == [[300, 5]]


def test_iovecs_go_on_within_the_one_that_was_moved_in_part() -> None:
    left = skip_bytes(iovecs(column(100, 200, 300), column(5, 5, 5)), 7, window=8)
    assert left.tolist() == [[202, 3], [300, 5]]


def test_iovecs_beyond_the_window_are_left_alone() -> None:
    left = skip_bytes(iovecs(column(100, 200, 300), column(5, 5, 5)), 10, window=2)
    assert left.tolist() == [[300, 5]]


def test_empty_iovecs_are_skipped_with_those_before_them() -> None:
    left = skip_bytes(iovecs(column(100, 200, 300), column(5, 0, 5)), 5, window=8)
    assert left.tolist() == [[300, 5]]


@pytest.mark.parametrize("count", [0, 1, FEW, FEW + 1, 1000])
def test_a_sum_of_lengths_does_not_wrap(count: int) -> None:
    lengths = np.full(count, 2**62 + 3, np.uint64)
    assert total_of(lengths) == count * (2**62 + 3)
