"""Whatever is done to keyed frames and records on their way: what opens is a beginning of what
was sent."""

from __future__ import annotations

import secrets
from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist.core.messages import MAX_REQUEST_BODY_NBYTES
from llm_datadist.transport.records import HEAD_NBYTES, PART_NBYTES, Records
from llm_datadist.transport.secret import KEYED_HEAD_NBYTES, Secret
from llm_datadist.transport.shield import NotAuthentic

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = b"a secret of more than sixteen bytes"

Frames = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5)
Ends: TypeAlias = "tuple[Secret | Records, Secret | Records]"


def keyed() -> tuple[Secret, Secret]:
    """A caller and a listener that have met, by one secret."""
    caller, listener = Secret(SECRET, is_caller=True), Secret(SECRET, is_caller=False)
    listener.answer(caller.answer(listener.answer(caller.start())))
    assert caller.is_done
    assert listener.is_done
    return caller, listener


def recorded() -> tuple[Records, Records]:
    """The same behind a hand-shake of TLS."""
    parts = secrets.token_bytes(PART_NBYTES), secrets.token_bytes(PART_NBYTES)
    return Records(*parts, is_caller=True), Records(*parts, is_caller=False)


BOTH = pytest.mark.parametrize("pair", [keyed, recorded])


def opened(end: Secret | Records, data: bytes, piece_nbytes: int) -> tuple[bytes, bool]:
    """What an end makes of bytes that come in pieces; and whether it refused some."""
    plain = b""
    try:
        for begin in range(0, len(data), piece_nbytes):
            plain += end.open(data[begin : begin + piece_nbytes], MAX_REQUEST_BODY_NBYTES)
    except NotAuthentic:
        return plain, True
    return plain, False


def num_equal(one: bytes, other: bytes) -> int:
    """How many bytes are the same in both before the first that is not."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


@st.composite
def alterations(draw: st.DrawFn) -> Callable[[list[bytes], list[bytes]], bytes]:
    """Of sealed frames, with those that went in the other direction at hand."""
    kind = draw(st.sampled_from(["flip", "cut out", "insert", "repeat", "swap", "drop", "reflect"]))
    where, other = draw(st.integers(0, 2**16)), draw(st.integers(0, 2**16))
    added = draw(st.binary(min_size=1, max_size=60))

    def alter(sealed: list[bytes], reflected: list[bytes]) -> bytes:
        frames, data = list(sealed), bytearray(b"".join(sealed))
        at, index = where % len(data), where % len(frames)
        if kind == "flip":
            data[at] ^= 1 << other % 8
        elif kind == "cut out":
            del data[at : at + 1 + other % 50]
        elif kind == "insert":
            data[at:at] = added
        elif kind == "repeat":
            frames.insert(other % (len(frames) + 1), frames[index])
        elif kind == "swap":
            frames[index], frames[other % len(frames)] = frames[other % len(frames)], frames[index]
        elif kind == "drop":
            del frames[index]
        else:
            frames.insert(index, reflected[other % len(reflected)])
        return bytes(data) if kind in ("flip", "cut out", "insert") else b"".join(frames)

    return alter


@BOTH
@given(frames=Frames, piece_nbytes=st.integers(1, 100), by_caller=st.booleans())
def test_frames_open_as_they_were_sealed(
    pair: Callable[[], Ends], frames: list[bytes], piece_nbytes: int, by_caller: bool
) -> None:
    caller, listener = pair()
    sender, receiver = (caller, listener) if by_caller else (listener, caller)
    sealed = b"".join(sender.seal(frame) for frame in frames)
    assert opened(receiver, sealed, piece_nbytes) == (b"".join(frames), False)


@BOTH
@given(
    frames=Frames,
    others=Frames,
    alter=st.lists(alterations(), min_size=1, max_size=3),
    piece_nbytes=st.integers(1, 100),
    by_caller=st.booleans(),
)
def test_altered_frames_open_to_a_beginning_of_what_was_sent(
    pair: Callable[[], Ends],
    frames: list[bytes],
    others: list[bytes],
    alter: list[Callable[[list[bytes], list[bytes]], bytes]],
    piece_nbytes: int,
    by_caller: bool,
) -> None:
    """The frames in front of the first byte that is not as it was; nothing behind it."""
    caller, listener = pair()
    sender, receiver = (caller, listener) if by_caller else (listener, caller)
    sealed = [sender.seal(frame) for frame in frames]
    reflected = [receiver.seal(frame) for frame in others]
    sent = b"".join(sealed)
    arrived = sent
    for change in alter:
        arrived = change([arrived], reflected) if arrived != sent else change(sealed, reflected)
        if not arrived:
            break
    plain, is_refused = opened(receiver, arrived, piece_nbytes)
    untouched = num_equal(sent, arrived)
    ends = list(accumulate(len(frame) for frame in sealed))
    whole = sum(end <= untouched for end in ends)
    assert b"".join(frames[:whole]).startswith(plain)
    if not is_refused:
        assert plain == b"".join(frames[:whole])
        rest = arrived[([0, *ends])[whole] :]
        head_nbytes = KEYED_HEAD_NBYTES if pair is keyed else HEAD_NBYTES
        nbytes = head_nbytes + int.from_bytes(rest[:4], "little")
        assert len(rest) < max(nbytes, head_nbytes), "it waits for the rest of a frame"


@BOTH
@given(frames=Frames)
def test_frames_that_come_back_are_refused(pair: Callable[[], Ends], frames: list[bytes]) -> None:
    for end in pair():
        sealed = b"".join(end.seal(frame) for frame in frames)
        assert opened(end, sealed, KEYED_HEAD_NBYTES + len(frames[0])) == (b"", True)


@BOTH
@given(frames=Frames)
def test_frames_of_one_connection_are_none_of_another(
    pair: Callable[[], Ends], frames: list[bytes]
) -> None:
    """The same secret makes another key for each: what was recorded is of no use."""
    (caller, _), (_, listener) = pair(), pair()
    sealed = b"".join(caller.seal(frame) for frame in frames)
    assert opened(listener, sealed, len(sealed)) == (b"", True)


@given(st.binary(max_size=64))
def test_only_the_end_of_a_link_proves_that_a_connection_is_of_it(made_up: bytes) -> None:
    """Another member has the secret, and links and connections of its own, but not this key."""
    link, stream, other = keyed(), keyed(), keyed()
    assert stream[1].proves(link[1], stream[0].proof(link[0]))
    for proof in (made_up, stream[0].proof(other[0]), other[0].proof(link[0])):
        assert not stream[1].proves(link[1], proof)
