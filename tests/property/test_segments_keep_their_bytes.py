"""core.segments: however segments are merged, cut, split or used up, the bytes stay the same."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist.core.segments import Segments, iovecs, skip_bytes

examples = settings(max_examples=80, deadline=None)

Triple = tuple[int, int, int]


def column(values: list[int]) -> npt.NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def segments_of(triples: list[Triple]) -> Segments:
    src, dst, nbytes = ([triple[field] for triple in triples] for field in range(3))
    return Segments(column(src), column(dst), column(nbytes))


def triples_of(segments: Segments) -> list[Triple]:
    columns = (segments.src, segments.dst, segments.nbytes)
    return list(zip(*(values.tolist() for values in columns), strict=True))


def bytes_of(segments: Segments) -> list[tuple[int, int]]:
    """Every byte that is moved, in order: from where, to where."""
    return [
        (src + offset, dst + offset)
        for src, dst, nbytes in triples_of(segments)
        for offset in range(nbytes)
    ]


@st.composite
def segment_lists(draw: st.DrawFn) -> Segments:
    """Segments of which many touch the one before: on both sides, on one, or on none."""
    triples: list[Triple] = []
    src, dst = draw(st.sampled_from([0, 2**63, 2**64 - 2000])), draw(st.integers(0, 2**40))
    for _ in range(draw(st.integers(0, 20))):
        nbytes = draw(st.integers(1, 40))
        triples.append((src, dst, nbytes))
        src += nbytes + draw(st.sampled_from([0, 0, 0, 1, 16]))
        dst += nbytes + draw(st.sampled_from([0, 0, 0, 1, 16]))
    if draw(st.booleans()):
        triples.reverse()
    return segments_of(triples)


@examples
@given(segment_lists())
def test_coalescing_keeps_every_byte_in_its_place_and_order(segments: Segments) -> None:
    assert bytes_of(segments.coalesced()) == bytes_of(segments)


@examples
@given(segment_lists())
def test_after_coalescing_no_neighbours_touch_on_both_sides(segments: Segments) -> None:
    for (src, dst, nbytes), behind in pairwise(triples_of(segments.coalesced())):
        assert (src + nbytes, dst + nbytes) != behind[:2]


@examples
@given(segment_lists(), st.integers(1, 50))
def test_bounding_keeps_every_byte_in_its_place_and_order(segments: Segments, limit: int) -> None:
    assert bytes_of(segments.bounded(limit)) == bytes_of(segments)


@examples
@given(segment_lists(), st.integers(1, 50))
def test_bounding_makes_the_fewest_pieces_that_hold_the_limit(
    segments: Segments, limit: int
) -> None:
    pieces = [nbytes for _, _, nbytes in triples_of(segments.bounded(limit))]
    assert max(pieces, default=0) <= limit
    assert len(pieces) == sum(-(-nbytes // limit) for _, _, nbytes in triples_of(segments))


#: lengths as they occur, from small blocks to whole tensors of many GiB
lengths = st.lists(st.integers(1, 100) | st.integers(1, 2**36), max_size=40)


def far_apart(nbytes: list[int]) -> Segments:
    return segments_of([(index << 40, index << 41, size) for index, size in enumerate(nbytes)])


@examples
@given(lengths.map(far_apart), st.integers(1, 9))
def test_the_parts_of_a_split_are_the_segments_in_their_order(
    segments: Segments, parts: int
) -> None:
    split = segments.split(parts)
    assert [triple for part in split for triple in triples_of(part)] == triples_of(segments)


@examples
@given(lengths.map(far_apart), st.integers(1, 9))
def test_a_split_has_at_most_the_parts_asked_for_and_none_is_empty(
    segments: Segments, parts: int
) -> None:
    split = segments.split(parts)
    assert len(split) <= parts
    assert all(len(part) for part in split)


@examples
@given(lengths.map(far_apart), st.integers(1, 9))
def test_no_part_of_a_split_is_off_its_fair_share_by_more_than_one_segment(
    segments: Segments, parts: int
) -> None:
    longest = max(segments.nbytes.tolist(), default=0)
    for part in segments.split(parts):
        assert abs(part.total_nbytes * parts - segments.total_nbytes) <= longest * parts


@examples
@given(count=st.integers(1, 300), nbytes=st.integers(1, 2**30), parts=st.integers(1, 16))
def test_equal_segments_are_dealt_out_evenly(count: int, nbytes: int, parts: int) -> None:
    sizes = [len(part) for part in far_apart([nbytes] * count).split(parts)]
    assert len(sizes) == min(parts, count)
    assert max(sizes) - min(sizes) <= 1


@examples
@given(segment_lists())
def test_iovecs_are_address_and_length_side_by_side(segments: Segments) -> None:
    vectors = iovecs(segments.dst, segments.nbytes)
    assert vectors.flags.c_contiguous
    assert vectors.dtype == np.uint64
    assert vectors.tolist() == [[dst, nbytes] for _, dst, nbytes in triples_of(segments)]


def stream_of(vectors: npt.NDArray[np.uint64]) -> list[int]:
    """The address of every byte, in order."""
    return [addr + offset for addr, nbytes in vectors.tolist() for offset in range(nbytes)]


@examples
@given(
    nbytes=st.lists(st.integers(0, 20), max_size=20),
    window=st.integers(1, 5),
    data=st.data(),
)
def test_iovecs_are_used_up_like_a_stream_of_bytes(
    nbytes: list[int], window: int, data: st.DataObject
) -> None:
    addrs = [index * 100 + 2**63 for index in range(len(nbytes))]
    vectors = iovecs(column(addrs), column(nbytes))
    stream = stream_of(vectors)
    while len(vectors):
        moved = data.draw(st.integers(0, int(vectors[:window, 1].sum())))
        vectors = skip_bytes(vectors, moved, window)
        stream = stream[moved:]
        assert stream_of(vectors) == stream
        if not moved and len(vectors):  # a call that moves nothing of something must not go on
            break


@examples
@given(nbytes=st.lists(st.integers(0, 20), min_size=1, max_size=20), window=st.integers(1, 5))
def test_whole_windows_of_iovecs_are_used_up_in_as_many_calls_as_they_need(
    nbytes: list[int], window: int
) -> None:
    vectors = iovecs(column([0] * len(nbytes)), column(nbytes))
    calls = 0
    while len(vectors):
        vectors = skip_bytes(vectors, int(vectors[:window, 1].sum()), window)
        calls += 1
    assert calls <= -(-len(nbytes) // window)
