"""Fetches: combs arrive as they were named, and nothing else than a plan could have made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from llm_datadist.core import combs
from llm_datadist.core import messages as m
from llm_datadist.core.combs import Combs, Teeth, overlap
from llm_datadist.core.fetches import names_of, pieces_of
from llm_datadist.core.messages import MAX_COMB_NBYTES, MAX_REQUEST_SEGMENTS, MAX_TEETH
from llm_datadist.core.packed import pack_columns
from llm_datadist.core.segments import Segments

if TYPE_CHECKING:
    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.segments import U64


def column(*values: int) -> U64:
    return np.array(values, dtype=np.uint64)


def fetch(columns: bytes, teeth: bytes = b"", tooth_nbytes: int = 0) -> m.Fetch:
    return m.Fetch(1, 1, 1, 1, 8, 1000, 1.0, columns, teeth, tooth_nbytes)


def pushed(pieces: Pieces) -> Pieces:
    frame = m.encode(fetch(*names_of(pieces)))
    request = m.decode_frame(frame)
    assert isinstance(request, m.Fetch)
    return pieces_of(request)


def rows(pieces: Pieces) -> list[tuple[int, int, int]]:
    return list(zip(*pieces.flat().lists, strict=True))


PLACES = column(1000, 5000), column(70000, 20000)


def test_pieces_arrive_as_they_were_named() -> None:
    comb = Combs(*PLACES, Teeth(column(0, 8, 24), column(32, 0, 64), 8))
    for pieces in (comb, comb.flat()):
        assert type(pushed(pieces)) is type(pieces)
        assert rows(pushed(pieces)) == rows(comb)


def test_offsets_before_the_place_are_named_from_the_lowest() -> None:
    """So it is where a source has its layers in another order than the destination."""
    before = (np.array([0, -24], dtype=np.int64)).view(np.uint64)
    comb = Combs(*PLACES, Teeth.of(before, column(0, 16), 8))
    assert rows(pushed(comb)) == [
        (976, 70016, 8), (1000, 70000, 8), (4976, 20016, 8), (5000, 20000, 8),
    ]  # fmt: skip


def test_what_a_plan_makes_is_within_the_bounds() -> None:
    assert combs.MOST_TEETH <= MAX_TEETH
    assert combs.MOST_NBYTES <= MAX_COMB_NBYTES


def packed(*columns: U64) -> bytes:
    return pack_columns(*columns)


PAIR = column(0, 8)
MANY = np.arange(MAX_TEETH + 1, dtype=np.uint64)
TOP = 2**63


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(fetch(b"", packed(PAIR, PAIR), 8), id="no-places"),
        pytest.param(fetch(packed(*PLACES), b"", 8), id="no-teeth"),
        pytest.param(fetch(packed(*PLACES), packed(PAIR, PAIR), 0), id="no-bytes"),
        pytest.param(fetch(packed(*PLACES)[8:], packed(PAIR, PAIR), 8), id="no-columns-of-places"),
        pytest.param(fetch(packed(*PLACES), packed(PAIR, PAIR)[8:], 8), id="no-columns-of-teeth"),
        pytest.param(fetch(packed(*PLACES), packed(MANY, MANY), 1), id="too-many-teeth"),
        pytest.param(
            fetch(packed(*PLACES), packed(PAIR * 2**18, PAIR * 2**18), MAX_COMB_NBYTES // 2 + 1),
            id="too-large-a-comb",
        ),
        pytest.param(
            fetch(packed(*[np.zeros(MAX_REQUEST_SEGMENTS // 2 + 1, "<u8")] * 2),
                  packed(PAIR, PAIR), 8),
            id="too-many-pieces",
        ),
        pytest.param(
            fetch(packed(*[np.zeros(MAX_REQUEST_SEGMENTS + 1, "<u8")] * 2),
                  packed(column(0), column(0)), 8),
            id="too-many-places",
        ),
        pytest.param(fetch(packed(*PLACES), packed(PAIR, column(0, 7)), 8), id="on-each-other"),
        pytest.param(fetch(packed(*PLACES), packed(PAIR, column(5, 0)), 8), id="lower-on-higher"),
        pytest.param(fetch(packed(*PLACES), packed(PAIR, column(0, 0)), 8), id="twice-the-same"),
        pytest.param(fetch(packed(*PLACES), packed(column(0, 7), PAIR), 8), id="source-on-itself"),
        pytest.param(fetch(packed(*PLACES), packed(column(8, 0), PAIR), 8), id="out-of-order"),
        pytest.param(fetch(packed(*PLACES), packed(PAIR, column(0, TOP - 7)), 8), id="too-far"),
        pytest.param(fetch(packed(*PLACES), packed(PAIR, column(0, 2**64 - 8)), 8), id="wraps"),
        pytest.param(
            fetch(packed(*PLACES), packed(column(2**64 - 1, 7), PAIR), 8), id="wraps-at-the-source"
        ),
        pytest.param(fetch(packed(*PLACES)), id="two-columns-without-teeth"),
    ],
)  # fmt: skip
def test_what_no_plan_makes_is_refused(request_: m.Fetch) -> None:
    with pytest.raises(m.ProtocolError):
        pieces_of(request_)


@pytest.mark.parametrize(
    ("teeth", "nbytes"),
    [(pack_columns(*[column(*range(513))] * 2), 1), (b"", MAX_COMB_NBYTES + 1)],
)
def test_what_is_too_large_is_not_even_decoded(teeth: bytes, nbytes: int) -> None:
    frame = m.encode(fetch(b"", teeth, nbytes))
    with pytest.raises(m.ProtocolError):
        m.decode_frame(frame)


def test_all_that_lies_between_the_teeth_of_a_place_must_be_one_tensors() -> None:
    comb = Combs(*PLACES, Teeth(column(0, 8), column(4096, 16), 8))
    landing = comb.landing()
    assert landing.dst.tolist() == [70016, 20016]
    assert landing.nbytes.tolist() == [4088, 4088]


def test_heads_of_other_ranks_lie_between_and_do_not_overlap() -> None:
    first, second = (
        Combs(column(0, 0), column(4096, 8192), Teeth(column(0, 8), column(at, at + 16), 8))
        for at in (0, 8)
    )
    assert first.landing().overlap(second.landing())
    assert not overlap(first, second)
    assert overlap(first, first)
    assert overlap(first, Segments.few([0], [8192 + 20], [8]))
    assert not overlap(first, Segments.few([0], [8192 + 8], [8]))
    assert not overlap(Segments.few([0], [0], [4096]), first)
