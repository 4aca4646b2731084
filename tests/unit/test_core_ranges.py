"""core.ranges and core.by_address: which memory holds a piece, and what belongs together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.core.by_address import ByAddress
from llm_datadist.core.ranges import NOWHERE, PushedLayout, Ranges

examples = settings(max_examples=200, deadline=None)
BASES = st.sampled_from([0, 2**40, 2**63 - 60, 2**64 - 130])


def column(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, dtype=np.uint64)


def holders(ranges: list[tuple[int, int, int]], addr: int, nbytes: int) -> set[int]:
    """By looking at each."""
    return {
        id_ for start, length, id_ in ranges if start <= addr and addr + nbytes <= start + length
    }


@examples
@given(
    BASES,
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 30)), max_size=12),
    st.lists(st.tuples(st.integers(0, 128), st.integers(1, 30)), max_size=20),
)
def test_a_piece_is_found_where_a_range_holds_it_whole(
    base: int, places: list[tuple[int, int]], pieces: list[tuple[int, int]]
) -> None:
    ranges = [(base + at, length, index + 1) for index, (at, length) in enumerate(places)]
    pieces = [(base + at, length) for at, length in pieces if base + at + length < 2**64]
    addrs, nbytes = (column([piece[field] for piece in pieces]) for field in (0, 1))
    found = Ranges(ranges).find(addrs, nbytes).tolist()
    for (addr, length), id_ in zip(pieces, found, strict=True):
        expected = holders(ranges, addr, length)
        assert id_ in expected if expected else id_ == NOWHERE


@pytest.mark.parametrize("nbytes", [1, 2**63, 2**64 - 8])
def test_a_piece_that_would_wrap_around_is_nowhere(nbytes: int) -> None:
    ranges = Ranges([(4096, 16, 1)])
    assert ranges.find(column([4100]), column([nbytes])).tolist() == [1 if nbytes == 1 else 0]


@examples
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 12)), max_size=12),
)
def test_of_what_is_pushed_every_byte_may_be_read_and_no_other(
    pushed: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    layout = PushedLayout.of(*(column([each[field] for each in pushed]) for field in (0, 1)))
    allowed = {byte for at, length in pushed for byte in range(at, at + length)}
    for at, length in asked:
        is_allowed = set(range(at, at + length)) <= allowed
        assert layout.covers(column([at]), column([length])) == is_allowed


@examples
@given(st.data(), st.booleans())
def test_parts_are_all_pieces_each_in_its_memory(data: st.DataObject, is_write: bool) -> None:
    ours = Ranges([(1000 * index, 100, index) for index in (1, 2, 3)])
    theirs = Ranges([(500 * index, 100, 10 + index) for index in (1, 2)])
    rows = data.draw(
        st.lists(
            st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 90), st.integers(0, 10)),
            max_size=20,
        )
    )
    here = [1000 * mine + at for mine, _, at, _ in rows]
    there = [500 * their + at for _, their, at, _ in rows]
    lengths = [length for *_, length in rows]
    asked = ByAddress.of(
        is_write=is_write, ours=column(here), theirs=column(there), nbytes=column(lengths),
        memory=ours,
    )  # fmt: skip
    moved = []
    for part in asked.parts(theirs):
        columns = (part.segments.src.tolist(), part.segments.dst.tolist())
        mine, their = columns if is_write else columns[::-1]
        for to, from_, nbytes in zip(mine, their, part.segments.nbytes.tolist(), strict=True):
            assert to // 1000 == part.our_id
            assert 10 + from_ // 500 == part.their_id
            moved += [(to + offset, from_ + offset) for offset in range(nbytes)]
    expected = [
        (to + offset, from_ + offset)
        for to, from_, nbytes in zip(here, there, lengths, strict=True)
        for offset in range(nbytes)
    ]
    assert sorted(moved) == sorted(expected)


def test_a_piece_that_no_memory_holds_is_refused_by_its_address() -> None:
    memory = Ranges([(4096, 64, 1)])
    good = column([4096, 4100])
    with pytest.raises(LLMException, match="0x1040") as error:
        ByAddress.of(
            is_write=False, ours=column([4096, 4160]), theirs=good, nbytes=column([1, 1]),
            memory=memory,
        )  # fmt: skip
    assert error.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    asked = ByAddress.of(
        is_write=True, ours=good, theirs=column([1, 4096]), nbytes=column([8, 8]), memory=memory
    )
    with pytest.raises(LLMException, match="0x1"):
        asked.parts(memory)
