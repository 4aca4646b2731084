"""core.messages by example: headers, caps, columns."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from llm_datadist.core import messages as m
from llm_datadist.core.packed import columns_of, pack_columns, pack_layers


def test_a_frame_begins_with_its_magic_and_the_length_of_its_body() -> None:
    frame = m.encode(m.Ready("tcp"))
    assert m.HEADER.unpack(frame[:8]) == (m.MAGIC, len(frame) - 8)


def test_the_first_bytes_on_the_wire_stay_as_they_are_from_release_to_release() -> None:
    assert m.encode(m.Bye()) == b"1DDL\x02\x00\x00\x00\x91\x08"


def test_a_message_over_the_cap_of_a_frame_is_not_sent() -> None:
    with pytest.raises(ValueError, match=r"a Read of 167772\d\d bytes is over the frame cap"):
        m.encode(m.Read(1, 1, 1, bytes(m.MAX_BODY_NBYTES)))


def test_the_largest_request_for_segments_fits_a_frame() -> None:
    frame = m.encode(m.Read(1, 1, 1, bytes(16 * m.MAX_REQUEST_SEGMENTS)))
    assert len(frame) < m.MAX_BODY_NBYTES


def test_a_table_of_thousands_of_caches_fits_a_frame() -> None:
    info = m.CacheInfo(2**40, 1, 64, 512, 2**15, True, True, 2**62, 2**47, bytes(512), b"")
    assert len(m.encode(m.Caches([info] * 25_000))) < m.MAX_BODY_NBYTES


@pytest.mark.parametrize("at", [float("nan"), float("inf"), -1.0])
def test_a_moment_that_cannot_be_is_a_protocol_error(at: float) -> None:
    body = msgspec.msgpack.encode(m.Fetch(1, 1, 1, 1, 8, 1, at, bytes(24)))
    with pytest.raises(m.ProtocolError, match="float"):
        m.decode(body)


@pytest.mark.parametrize("timeout_ms", [2**41 + 1, 2**64 - 1, -1])
def test_a_timeout_that_no_program_can_set_is_a_protocol_error(timeout_ms: int) -> None:
    body = msgspec.msgpack.encode(m.Read(1, 1, timeout_ms, b""))
    with pytest.raises(m.ProtocolError, match="int"):
        m.decode(body)


@pytest.mark.parametrize(
    "message",
    [
        m.Vouch(bytes(300)),
        m.Vouched(b"", True),
        m.Ready("x" * 4097),
        m.Refused(-1, "no"),
        m.DialBack(0),
        m.Attach(b"short", False),
        m.Hello(1, 2, bytes(16), True, True, 1, {}, m.ProbeTarget(-1, bytes(16), 0, 0)),
        m.Refused(1, "half a pair: \ud800"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_no_peer_could_decode_is_not_encoded(message: m.Message) -> None:
    """Whoever has us say it would have the peer end its link."""
    with pytest.raises(ValueError):  # noqa: PT011  (also that of a character which is none)
        m.encode(message)


@pytest.mark.parametrize(
    "names", [[], ["x" * 4097], list(range(4097)), ["x" * 4000] * 300, [2**64], ["\ud800"]]
)
def test_layers_that_no_peer_could_decode_are_not_packed(names: list[int | str]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (as above)
        pack_layers(names)


@pytest.mark.parametrize("nbytes", [0, 1, 64])
def test_a_header_announces_a_body_up_to_the_cap(nbytes: int) -> None:
    assert m.body_nbytes(m.HEADER.pack(m.MAGIC, nbytes), 64) == nbytes


def test_a_header_that_announces_more_than_the_cap_is_a_protocol_error() -> None:
    with pytest.raises(m.ProtocolError, match="65 bytes is over the cap of 64"):
        m.body_nbytes(m.HEADER.pack(m.MAGIC, 65), 64)


def test_a_header_of_something_else_is_a_protocol_error() -> None:
    with pytest.raises(m.ProtocolError, match="expected the magic"):
        m.body_nbytes(b"GET / HT", 2**32)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\x92\x03\xa2\xff\xff", id="text that is no UTF-8"),
        pytest.param(b"\x92\x07\x41", id="65 streams at once"),
        pytest.param(b"\x92\x07\x00", id="no streams at all"),
        pytest.param(b"\x92\x0a\xc4\x0f" + bytes(15), id="a token that is too short"),
        pytest.param(b"\x92\x0a\xc4\x11" + bytes(17), id="a token that is too long"),
        pytest.param(b"\x92\x03\xda\x10\x01" + b"x" * 4097, id="text that is too long"),
        pytest.param(b"\x93\x06\xff\xa0", id="a negative status"),
        pytest.param(b"\x91\x7f", id="a tag that is not known"),
        pytest.param(b"\x92\x08\x01", id="a field too many"),
        pytest.param(b"\x92\x06\x01", id="a field too few"),
        pytest.param(b"\x92\x03\x01", id="a field of another type"),
    ],
)
def test_a_body_that_is_no_message_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(m.ProtocolError):
        m.decode(body)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_columns_arrive_as_they_were_packed(count: int) -> None:
    sent = [np.arange(start, start + 4, dtype=np.uint64) << np.uint64(55) for start in range(count)]
    received = columns_of(pack_columns(*sent), count)
    assert [column.tolist() for column in received] == [column.tolist() for column in sent]


def test_columns_are_little_endian_on_the_wire() -> None:
    assert pack_columns(np.array([1], dtype=np.uint64)) == b"\x01" + bytes(7)


def test_the_columns_of_no_segments_are_empty() -> None:
    assert [column.tolist() for column in columns_of(b"", 3)] == [[], [], []]


@pytest.mark.parametrize("nbytes", [1, 8, 24, 16 * m.MAX_REQUEST_SEGMENTS + 16])
def test_bytes_that_are_no_two_columns_or_too_long_ones_are_a_protocol_error(nbytes: int) -> None:
    with pytest.raises(m.ProtocolError, match="columns"):
        columns_of(bytes(nbytes), 2)
