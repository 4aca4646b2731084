"""core.frames by example: what a reader keeps, and for how long."""

from __future__ import annotations

import tracemalloc

import pytest

from llm_datadist.core import messages as m
from llm_datadist.core.frames import FrameReader

CHUNK = 64 * 1024


def test_a_reader_accepts_no_more_than_a_greeting_until_the_peer_is_known() -> None:
    reader = FrameReader()
    reader.feed(m.HEADER.pack(m.MAGIC, m.MAX_GREETING_NBYTES + 1))
    with pytest.raises(m.ProtocolError):
        list(reader)


def test_a_reader_accepts_larger_frames_from_when_its_cap_is_raised() -> None:
    message = m.Read(1, 1, 1, bytes(2 * m.MAX_GREETING_NBYTES))
    reader = FrameReader()
    reader.feed(m.encode(m.Bye()))
    assert list(reader) == [m.Bye()]
    reader.max_nbytes = m.MAX_BODY_NBYTES
    reader.feed(m.encode(message))
    assert list(reader) == [message]


def test_messages_can_be_taken_one_at_a_time() -> None:
    reader = FrameReader()
    reader.feed(m.encode(m.Bye()) + m.encode(m.ByeDone()))
    taken = [next(iter(reader)), next(iter(reader))]
    assert taken == [m.Bye(), m.ByeDone()]
    assert reader.is_empty


def test_a_header_that_was_refused_is_refused_again() -> None:
    reader = FrameReader()
    reader.feed(b"GET / HTTP/1.1\r\n")
    for _ in range(2):
        with pytest.raises(m.ProtocolError):
            list(reader)


def peak_nbytes_of_reading(stream: bytes, cap: int) -> int:
    """The most memory that was held while a stream was read chunk by chunk."""
    chunks = [stream[start : start + CHUNK] for start in range(0, len(stream), CHUNK)]
    reader = FrameReader(cap)
    tracemalloc.start()
    try:
        for chunk in chunks:
            reader.feed(chunk)
            for _ in reader:
                pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_endless_stream_of_small_messages_takes_no_more_memory_than_a_few_chunks() -> None:
    frame = m.encode(m.Ready("x" * 1000))
    stream = frame * (32 * CHUNK // len(frame))
    assert peak_nbytes_of_reading(stream, m.MAX_GREETING_NBYTES) < 4 * CHUNK


def test_frames_of_the_full_cap_take_no_more_memory_than_a_few_of_them() -> None:
    cap = 8 * CHUNK
    frame = m.encode(m.Read(1, 1, 1, bytes(cap - 12)))
    assert peak_nbytes_of_reading(frame * 10, cap) < 4 * (cap + CHUNK)


def test_a_list_that_claims_to_be_huge_takes_no_memory() -> None:
    body = b"\x92\x18\xdd\xff\xff\xff\xff"
    tracemalloc.start()
    try:
        with pytest.raises(m.ProtocolError):
            m.decode(body)
        assert tracemalloc.get_traced_memory()[1] < CHUNK
    finally:
        tracemalloc.stop()
