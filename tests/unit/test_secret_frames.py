"""Frames under a shared secret, two ends in one thread: each opens once, in its place."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from llm_datadist.core import messages as m
from llm_datadist.errors import LLMException
from llm_datadist.running.deadline import Deadline
from llm_datadist.transport.sealed import KeyedStream
from llm_datadist.transport.secret import KEYED_HEAD_NBYTES, Secret
from llm_datadist.transport.shield import NotAuthentic
from meeting import meet

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = b"a secret of more than sixteen bytes"
TIME_S = 5.0
LIKELY = m.Sending(32768)
#: the likely one; as long; longer; shorter; so long that it is not kept
ANSWERS = (LIKELY, LIKELY, m.Sending(32769), LIKELY, m.Sending(2**40), m.Attached(), LIKELY, LIKELY)
LONG = m.encode(m.Refused(1, "a text that is longer than an answer"))


@pytest.fixture
def ends() -> tuple[Secret, Secret]:
    caller, listener = Secret(SECRET, is_caller=True), Secret(SECRET, is_caller=False)
    assert meet(caller, listener) == ("", "")
    return caller, listener


@contextmanager
def stream(shield: Secret) -> Iterator[tuple[KeyedStream, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield KeyedStream(here, shield), there


@pytest.mark.parametrize("rests", [True, False])
def test_a_frame_that_is_sent_again_is_keyed_anew(ends: tuple[Secret, Secret], rests: bool) -> None:
    caller, listener = ends
    frames = [m.encode(answer) for answer in ANSWERS]
    frames[3:3] = [LONG, LONG]
    said = []
    for frame in frames:
        said.append(listener.seal(frame))
        if rests:
            listener.rest()
            listener.rest()
        assert caller.open(said[-1]) == frame
    assert len(set(said)) == len(said)
    assert len({each[4:KEYED_HEAD_NBYTES] for each in said}) == len(said), "no MAC comes again"


@pytest.mark.parametrize("rests", [True, False])
@pytest.mark.parametrize("likely", [LIKELY, m.Sending(1), None], ids=["likely", "other", "none"])
def test_a_stream_hears_what_is_said_whatever_is_likely(
    ends: tuple[Secret, Secret], likely: m.Sending | None, rests: bool
) -> None:
    caller, listener = ends
    with stream(caller) as (asking, there):
        for answer in ANSWERS:
            there.sendall(listener.seal(m.encode(answer)))
            if rests:
                listener.rest()
            assert asking.receive(Deadline.after(TIME_S), likely=likely) == answer


def test_the_likely_answer_in_parts_is_waited_for(ends: tuple[Secret, Secret]) -> None:
    """All but its last byte, which is 0 as what is not filled yet is."""
    caller, listener = ends
    keyed = listener.seal(m.encode(LIKELY))
    assert keyed.endswith(b"\0")
    with stream(caller) as (asking, there):
        there.sendall(keyed[:-1])
        with pytest.raises(LLMException, match="timed out"):
            asking.receive(Deadline.after(0.1), likely=LIKELY)


def test_the_likely_answer_opens_once(ends: tuple[Secret, Secret]) -> None:
    caller, listener = ends
    with stream(caller) as (asking, there):
        keyed = listener.seal(m.encode(LIKELY))
        there.sendall(keyed)
        assert asking.receive(Deadline.after(TIME_S), likely=LIKELY) == LIKELY
        there.sendall(keyed)
        with pytest.raises(LLMException, match="somebody is in between"):
            asking.receive(Deadline.after(TIME_S), likely=LIKELY)


def test_one_that_was_left_out_is_missed(ends: tuple[Secret, Secret]) -> None:
    caller, listener = ends
    frame = m.encode(LIKELY)
    listener.seal(frame)
    listener.rest()
    with pytest.raises(NotAuthentic, match="somebody is in between"):
        caller.open(listener.seal(frame))


@pytest.mark.parametrize("at", range(KEYED_HEAD_NBYTES + len(m.encode(LIKELY))))
def test_one_changed_bit_of_the_likely_answer_is_seen(ends: tuple[Secret, Secret], at: int) -> None:
    caller, listener = ends
    keyed = bytearray(listener.seal(m.encode(LIKELY)))
    keyed[at] ^= 1
    with stream(caller) as (asking, there):
        there.sendall(keyed)
        there.shutdown(socket.SHUT_WR)
        with pytest.raises(LLMException):
            asking.receive(Deadline.after(TIME_S), likely=LIKELY)
