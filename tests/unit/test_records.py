"""Records of one connection: of every size, under key after key, and what is none."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from llm_datadist.core.messages import HEADER, MAX_BODY_NBYTES
from llm_datadist.transport.records import (
    HEAD_NBYTES,
    OVERHEAD_NBYTES,
    PART_NBYTES,
    RECORD_NBYTES,
    RENEWED_AFTER,
    Records,
)
from llm_datadist.transport.shield import NotAuthentic


@pytest.fixture
def ends() -> tuple[Records, Records]:
    """A caller's and a listener's."""
    parts = secrets.token_bytes(PART_NBYTES), secrets.token_bytes(PART_NBYTES)
    return Records(*parts, is_caller=True), Records(*parts, is_caller=False)


@pytest.mark.parametrize(
    "nbytes",
    [
        1, 15, 16, 17, 4095, RECORD_NBYTES - 1, RECORD_NBYTES, RECORD_NBYTES + 1, 3 * 2**20 + 7,
    ],
)  # fmt: skip
def test_bytes_of_any_length_arrive_either_way(ends: tuple[Records, Records], nbytes: int) -> None:
    """As a frame, and as the bytes of a cache, in turn on one connection."""
    caller, listener = ends
    data = secrets.token_bytes(nbytes)
    assert listener.open(caller.seal(data), MAX_BODY_NBYTES) == data
    record, room = (np.empty(RECORD_NBYTES + n, np.uint8) for n in (OVERHEAD_NBYTES, 0))
    arrived = b""
    for at in range(0, nbytes, RECORD_NBYTES):
        piece = np.frombuffer(data[at : at + RECORD_NBYTES], np.uint8)
        sealed = caller.seal_into(piece, record)
        assert len(piece) < 15 or piece.tobytes()[:15] not in bytes(sealed)
        head, body = bytes(sealed[:HEAD_NBYTES]), sealed[HEAD_NBYTES:]
        assert listener.body_nbytes(head) == len(body)
        arrived += listener.open_into(head, body, room)
    assert arrived == data
    assert caller.open(listener.seal(data), MAX_BODY_NBYTES) == data


def test_a_key_is_renewed_before_it_has_sealed_too_much(ends: tuple[Records, Records]) -> None:
    """Both ends take the same new ones, and what was said once never looks the same again."""
    caller, listener = ends
    said = [caller.seal(b"again") for _ in range(2 * RENEWED_AFTER + 2)]
    assert len(set(said)) == len(said)
    heard = [listener.open(record, MAX_BODY_NBYTES) for record in said]
    assert set(heard) == {b"again"}


def test_a_record_that_does_not_open_opens_at_no_other_time(ends: tuple[Records, Records]) -> None:
    caller, listener = ends
    record = bytearray(caller.seal(b"of a cache"))
    record[-1] ^= 1
    room = np.empty(RECORD_NBYTES, np.uint8)
    with pytest.raises(NotAuthentic, match="somebody is in between"):
        listener.open_into(bytes(record[:HEAD_NBYTES]), memoryview(record)[HEAD_NBYTES:], room)
    record[-1] ^= 1
    with pytest.raises(NotAuthentic, match="somebody is in between"):
        listener.open(bytes(record), MAX_BODY_NBYTES)


@pytest.mark.parametrize("nbytes", [0, 16, RECORD_NBYTES + 17, 2**32 - 1])
def test_what_cannot_be_the_length_of_a_record_is_refused_before_more_comes(
    ends: tuple[Records, Records], nbytes: int
) -> None:
    with pytest.raises(NotAuthentic, match="no record"):
        ends[0].open(nbytes.to_bytes(4, "little"), MAX_BODY_NBYTES)


def test_a_record_is_no_longer_than_a_frame_may_be(ends: tuple[Records, Records]) -> None:
    """So that what a stranger has half sent takes no more room than a frame of a stranger's."""
    caller, listener = ends
    most = HEADER.size + 100
    assert listener.open(caller.seal(bytes(most)), 100) == bytes(most)
    with pytest.raises(NotAuthentic, match="no record"):
        listener.open(caller.seal(bytes(most + 1))[:HEAD_NBYTES], 100)
