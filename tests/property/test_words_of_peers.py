"""core.words: whatever a peer says, what is shown of it is one line of characters that print."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_datadist.core import messages as m
from llm_datadist.core.stats import ClusterStats, LinkEvents, LinkStats, PoolStats, WaitStats
from llm_datadist.core.stats import Histogram as Times
from llm_datadist.core.words import MAX_SHOWN, printable

#: what does something on a terminal or in a log, or is not there at all
HARMFUL = ["\x1b", "\x07", "\x00", "\x7f", "\x9b", "\r", "\n", "\x85", "\u2028", "\u202e", "\u2066",
           "\u200b", "\ufeff", "\ud800", "\U000e0041"]  # fmt: skip
any_text = st.text(st.characters(exclude_categories=()) | st.sampled_from(HARMFUL), max_size=80)


@given(any_text | any_text.map(lambda text: text * 60))
@example("\x1b" * MAX_SHOWN)
@example("x" * MAX_SHOWN)
@example("x" * (MAX_SHOWN + 1))
def test_words_become_one_short_line_that_prints_and_stays_as_it_is(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    assert len(shown) <= MAX_SHOWN
    assert not any(unicodedata.category(character).startswith("C") for character in shown)
    assert printable(shown) == shown
    shown.encode()


@given(st.text().filter(lambda text: text.isprintable()))
def test_words_that_print_are_left_alone(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("harm", HARMFUL)
def test_what_a_character_was_can_be_read(harm: str) -> None:
    shown = printable(f"a{harm}b")
    assert shown.encode().decode("unicode_escape") == f"a{harm}b"


def test_words_that_were_cut_say_so() -> None:
    assert printable("x" * 5000).endswith("x…")


def messages_with(text: str) -> list[m.Message]:
    stats = ClusterStats(
        1, 1.0, 1, 0, 0, True,
        links=(LinkStats(2, text, text, text, text),),
        pools=(PoolStats(text, text, 1, 1, 1),),
        waits=(WaitStats(text, Times()),),
        link_events=(LinkEvents(text, 1, 1),),
    )  # fmt: skip
    return [
        m.Refused(5, text), m.Unusable(text, text, True), m.Ready(text), m.Linked(text),
        m.Stats(stats),
    ]  # fmt: skip


@given(any_text.map(lambda text: text.encode("utf-8", "replace").decode()))
def test_words_are_printable_where_they_are_decoded(text: str) -> None:
    for message in messages_with(text):
        decoded = m.decode(m.encode(message)[m.HEADER.size :])
        assert decoded in messages_with(printable(text))


def test_names_that_are_only_compared_are_left_as_they_are() -> None:
    asked = m.ListExports("a\x1bpath")
    assert m.decode(m.encode(asked)[m.HEADER.size :]) == asked
