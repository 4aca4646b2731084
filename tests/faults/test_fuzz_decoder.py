"""Made-up bytes at the decoder: what it allocates is for what came, whatever was announced.

That it raises nothing but ProtocolError is shown in tests/property and by tests/fuzz/frames.py.
"""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import FRAMES, mutations, said
from wire import hello

from llm_datadist.core import messages as m
from llm_datadist.core.frames import FrameReader

if TYPE_CHECKING:
    from collections.abc import Callable

#: of msgpack's smallest values, a byte each, Python makes objects and references of at most so much
BLOW_UP = 100
FIXED_NBYTES = 64 * 1024


def peak_nbytes(work: Callable[[], object]) -> int:
    """What `work` allocates at most, at one time; it may end with a ProtocolError."""
    tracemalloc.start()
    try:
        with suppress(m.ProtocolError):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None)
@given(mutations([frame[m.HEADER.size :] for frame in FRAMES]), st.integers(1, 2000))
def test_decoding_allocates_for_what_came_and_not_for_what_was_announced(
    body: bytes, times: int
) -> None:
    many = m.HEADER.size * b"\x93" + body * times  # deep, and then a lot of it
    for data in (body, many):
        peak = peak_nbytes(lambda data=data: m.decode(data))  # type: ignore[misc]
        assert peak < BLOW_UP * len(data) + FIXED_NBYTES, f"{peak} bytes for {len(data)}"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            m.encode(m.Caches([]))[m.HEADER.size :].replace(b"\x90", b"\xdd\x00\x01\x00\x00")
            + b"\x90" * 65536,
            id="many-empty-lists",
        ),
        pytest.param(
            m.encode(hello(cluster_id=1))[m.HEADER.size :].replace(
                b"\x81\xa3tcp\xc4\x00",
                b"\xde\x40\x00"
                + b"".join(b"\xa3" + b"%03x" % n + b"\xc4\x00" for n in range(0x1000)) * 4,
            ),
            id="many-offers",
        ),
    ],
)
def test_the_most_costly_bodies_are_bounded_too(body: bytes) -> None:
    peak = peak_nbytes(lambda: m.decode(body))
    assert peak < BLOW_UP * len(body) + FIXED_NBYTES


@settings(max_examples=100, deadline=None)
@given(st.lists(said, max_size=6), st.integers(0, 2**32 - 1))
def test_a_reader_keeps_no_more_than_a_frame_of_its_cap(pieces: list[bytes], nbytes: int) -> None:
    """However large the frame is that a header announces, and however much of it comes."""
    cap, chunk = m.MAX_GREETING_NBYTES, bytes(16 * 1024)
    flood = [*pieces, m.HEADER.pack(m.MAGIC, nbytes), *[chunk] * 12]

    def read() -> None:
        reader = FrameReader(cap)
        for piece in flood:
            reader.feed(piece)
            for message in reader:
                assert isinstance(message, m.Message)

    came = sum(map(len, pieces))
    assert peak_nbytes(read) < 4 * (cap + len(chunk)) + BLOW_UP * came + FIXED_NBYTES
