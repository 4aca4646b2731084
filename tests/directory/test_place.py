"""Whose the place of a cluster id is, with a clock of the test's."""

from __future__ import annotations

from directory.records import record
from llm_datadist.directory.place import Place
from llm_datadist.directory.record import Entry

TTL_S = 10.0
OURS, THEIRS = (Entry(record=record(1, number), ttl_s=TTL_S) for number in (1, 2))
THEY_LEFT = Entry(record=record(1, 2), ttl_s=TTL_S, has_left=True)


def test_a_place_that_nobody_has_is_ours() -> None:
    place = Place(OURS)
    for there in (None, OURS, THEY_LEFT):
        assert place.rival(there, "a sign", 0.0) is None


def test_who_renews_keeps_the_place() -> None:
    place = Place(OURS)
    for number in range(100):
        assert place.rival(THEIRS, number // 2, number * TTL_S / 3) == THEIRS.record


def test_who_is_silent_is_given_up_after_two_ttl() -> None:
    place = Place(OURS)
    looks = [number * TTL_S / 3 for number in range(10)]
    held = [place.rival(THEIRS, "the same", now) is not None for now in looks]
    assert held == [now < 2 * TTL_S for now in looks]


def test_who_left_gives_the_place_at_once() -> None:
    place = Place(OURS)
    assert place.rival(THEIRS, 1, 0.0) == THEIRS.record
    assert place.rival(THEY_LEFT, 2, 1.0) is None
    assert place.rival(None, None, 2.0) is None


def test_a_directory_that_was_emptied_gives_it_nobody() -> None:
    place = Place(OURS)
    assert place.rival(THEIRS, 1, 0.0) == THEIRS.record
    gone = [5.0 + number * TTL_S / 3 for number in range(5)]
    assert all(place.rival(None, None, now) == THEIRS.record for now in gone)
    assert place.rival(THEIRS, 1, gone[-1] + 1.0) == THEIRS.record  # written again
    gone = [30.0 + number * TTL_S / 3 for number in range(8)]
    held = [place.rival(None, None, now) is not None for now in gone]
    assert held == [now < 30.0 + 2 * TTL_S for now in gone]


def test_while_we_did_not_look_it_may_have_lived() -> None:
    """The directory was gone, we were stopped, the host slept."""
    place = Place(OURS)
    assert place.rival(THEIRS, 1, 0.0) == THEIRS.record
    looks = [1000.0 + number * TTL_S / 3 for number in range(10)]
    held = [place.rival(THEIRS, 1, now) is not None for now in looks]
    assert held == [now < 1000.0 + 2 * TTL_S for now in looks]


def test_a_rival_with_a_short_ttl_is_not_looked_at_so_often() -> None:
    place = Place(OURS)
    theirs = Entry(record=record(1, 2), ttl_s=1.0)
    looks = [number * TTL_S / 3 for number in range(4)]
    held = [place.rival(theirs, 1, now) is not None for now in looks]
    assert held == [True, False, False, False]
