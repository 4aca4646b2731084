"""core.messages and core.frames: what is sent arrives, and nothing but a message ever does."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wire_messages import MESSAGE_TYPES, messages, messages_of

from llm_datadist.core import messages as m
from llm_datadist.core.frames import FrameReader

examples = settings(max_examples=60, deadline=None)

CAP = 4096


def body_of(frame: bytes) -> bytes:
    return frame[m.HEADER.size :]


def pieces_of(data: st.DataObject, stream: bytes) -> list[bytes]:
    """The stream in pieces as a network might deliver it."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    return [
        stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)
    ]


def read_all(pieces: list[bytes], cap: int = CAP) -> list[m.AnyMessage]:
    """The messages in the pieces, up to the first thing that is none."""
    reader = FrameReader(cap)
    found: list[m.AnyMessage] = []
    with suppress(m.ProtocolError):
        for piece in pieces:
            reader.feed(piece)
            found.extend(reader)  # keeps what came before an error
    return found


@pytest.mark.parametrize("kind", MESSAGE_TYPES)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_what_is_decoded_is_what_was_encoded(kind: type[m.Message], data: st.DataObject) -> None:
    message = data.draw(messages_of(kind))
    assert m.decode(body_of(m.encode(message))) == message


@examples
@given(st.lists(messages, max_size=6), st.data())
def test_messages_come_out_of_a_stream_however_it_is_cut(
    sent: list[m.Message], data: st.DataObject
) -> None:
    assert read_all(pieces_of(data, b"".join(map(m.encode, sent)))) == sent


@examples
@given(messages, st.data())
def test_a_reader_is_empty_between_frames_and_not_within_one(
    message: m.Message, data: st.DataObject
) -> None:
    frame = m.encode(message)
    part = data.draw(st.integers(1, len(frame) - 1))
    reader = FrameReader(CAP)
    reader.feed(frame[:part])
    assert (list(reader), reader.is_empty) == ([], False)
    reader.feed(frame[part:])
    assert (list(reader), reader.is_empty) == ([message], True)


@examples
@given(messages, st.data())
def test_a_body_that_was_cut_short_is_refused(message: m.Message, data: st.DataObject) -> None:
    body = body_of(m.encode(message))
    with pytest.raises(m.ProtocolError):
        m.decode(body[: data.draw(st.integers(0, len(body) - 1))])


@examples
@given(messages, st.binary(min_size=1, max_size=8))
def test_a_body_with_more_behind_it_is_refused(message: m.Message, rest: bytes) -> None:
    with pytest.raises(m.ProtocolError):
        m.decode(body_of(m.encode(message)) + rest)


def decodes_or_refuses(body: bytes) -> bool:
    """Whether it is a message; anything but a ProtocolError passes through."""
    try:
        return isinstance(m.decode(body), m.Message)
    except m.ProtocolError:
        return False


@st.composite
def mutations(draw: st.DrawFn, original: bytes) -> bytes:
    """The bytes with a few of them changed, taken out, put in or doubled."""
    mutated = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(mutated)))
        mutated[at : at + draw(st.integers(0, 2))] = draw(
            st.binary(max_size=3) | st.just(bytes(mutated[at : at + 4]))
        )
    return bytes(mutated)


@settings(examples, max_examples=250)
@given(messages.flatmap(lambda message: mutations(body_of(m.encode(message)))))
@example(b"\x92\x03\xa2\xff\xff").via("text that is no UTF-8")
@example(b"\x92\x18\xdd\xff\xff\xff\xff").via("a list of 2**32 - 1 things of which none follows")
@example(b"\x92\x03" + b"\x91" * 100_000).via("lists nested deeper than any stack")
@example(b"\x92\x03\xd6\xff\x00\x00\x00\x00").via("a timestamp")
@example(b"").via("nothing")
def test_a_mutated_body_is_a_message_or_a_protocol_error(body: bytes) -> None:
    decodes_or_refuses(body)


@settings(examples, max_examples=120)
@given(st.lists(messages, min_size=1, max_size=3), st.data())
def test_a_mutated_frame_is_a_protocol_error_at_worst_and_spoils_none_before_it(
    sent: list[m.Message], data: st.DataObject
) -> None:
    *intact, last = map(m.encode, sent)
    stream = b"".join(intact) + data.draw(mutations(last))
    assert read_all(pieces_of(data, stream))[: len(intact)] == sent[:-1]


@examples
@given(st.binary(max_size=200))
def test_random_bytes_are_no_frames(stream: bytes) -> None:
    assert read_all([stream]) == []


@examples
@given(st.binary(max_size=60))
def test_a_random_body_is_a_message_or_a_protocol_error(body: bytes) -> None:
    decodes_or_refuses(body)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=17),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@settings(examples, max_examples=120)
@given(st.sampled_from([*range(40), -1, "Hello", None]), st.lists(values, max_size=12))
def test_fields_of_wrong_types_or_numbers_are_a_protocol_error(tag: Any, fields: list[Any]) -> None:
    body = msgspec.msgpack.encode([tag, *fields])
    if decodes_or_refuses(body):  # these happened to be the fields of such a message
        decoded = m.decode(body)
        assert m.decode(body_of(m.encode(decoded))) == decoded


@examples
@given(cap=st.integers(0, 300), over=st.integers(0, 2**32 - 1), data=st.data())
def test_a_frame_over_the_cap_is_refused_as_soon_as_its_header_is_complete(
    cap: int, over: int, data: st.DataObject
) -> None:
    nbytes = min(cap + 1 + over, 2**32 - 1)
    header = m.HEADER.pack(m.MAGIC, nbytes)
    reader = FrameReader(cap)
    for piece in pieces_of(data, header[:-1]):
        reader.feed(piece)
        assert list(reader) == []
    reader.feed(header[-1:])
    with pytest.raises(m.ProtocolError):
        list(reader)


@examples
@given(messages)
def test_a_frame_of_just_the_cap_is_accepted_and_one_byte_more_is_not(message: m.Message) -> None:
    frame = m.encode(message)
    cap = len(body_of(frame))
    assert (read_all([frame], cap), read_all([frame], cap - 1)) == ([message], [])


@examples
@given(messages, st.data())
def test_a_frame_of_another_protocol_is_refused(message: m.Message, data: st.DataObject) -> None:
    magic = data.draw(
        st.binary(min_size=4, max_size=4).filter(lambda b: b != m.encode(message)[:4])
    )
    reader = FrameReader(CAP)
    reader.feed(magic + m.encode(message)[4:])
    with pytest.raises(m.ProtocolError):
        list(reader)
