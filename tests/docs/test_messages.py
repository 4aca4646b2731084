"""What the source says to people is on the pages: every message, found by its syntax."""

from __future__ import annotations

import messages
import pytest

#: what no user meets, and why
NOT_ON_A_PAGE = {
    "nothing is handed out at offset … of …": "a pool's own check of who frees",
    "nothing is handed out at …": "the same",
    "a … that no peer could decode: …": "a check of what this library itself sends",
    "… bytes of names, … are possible": "behind `peers cannot be told which layers the layout has`",
    "a … of … bytes is over the frame cap": "a check of what this library itself sends",
    "cluster_id": "no message, but the name of an argument",
    "no pull failed": "a step of the contract that transports are tested by",
}


def is_about(entry: str, text: str) -> bool:
    """Whether the entry's words are a good part of the message, and not those of many."""
    return entry in text and 4 * len(entry) >= len(text)


def test_every_message_is_on_a_page() -> None:
    entries = [quote for page in messages.PAGES for quote in messages.quoted(page)]
    missing = [
        message.place
        for message in messages.said()
        if message.text not in NOT_ON_A_PAGE
        and not any(is_about(entry, message.text) for entry in entries)
    ]
    assert missing == []


def test_what_is_left_out_is_said_nevertheless() -> None:
    assert set(NOT_ON_A_PAGE) <= {message.text for message in messages.said()}


@pytest.mark.parametrize("quote", messages.quoted(messages.OTHERS))
def test_a_message_of_the_page_is_in_the_source(quote: str) -> None:
    assert any(quote in template for template in messages.templates())


def test_no_message_has_two_entries() -> None:
    quotes = [quote for page in messages.PAGES for quote in messages.quoted(page)]
    assert sorted({quote for quote in quotes if quotes.count(quote) > 1}) == []


SOURCE = """
class Stale(RuntimeError): pass
def gone(what): return Stale(f"{what} is gone: {1}{2}")
def refuse(x):
    if x: raise Stale("one " "two")
    elif x is None: raise helper(f"{x:#x} is no address")
    raise deadline.expired("not looked at")
logger.warning("%s took more than %.1f s", 1, 2)
logger.info("not looked at, either")
Finding("a", State.OK, "all is well here"); Finding("a", State.NOTE, "it is slow", "mend it")
raise Stale(str(error))
raise Stale(f"{a}: {b}")
"""


def test_what_is_found_in_a_source() -> None:
    assert [message.text for message in messages.said_in({"file": SOURCE})] == [
        "… took more than … s", "it is slow", "… is gone: …", "one two", "… is no address",
    ]  # fmt: skip
