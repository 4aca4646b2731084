"""core.link by example: one machine at a time, and what its decisions say."""

from __future__ import annotations

import pytest

from llm_datadist.core import link as lk
from llm_datadist.core import link_actions as act
from llm_datadist.core import messages as m
from llm_datadist.errors import LLMStatusCode

PROBE = m.ProbeTarget(4096, b"n" * 16, 8192, 1)
TOKEN = b"t" * 16
NONCE = b"o" * 16


def make_identity(*paths: str, path: str = "auto") -> lk.Identity:
    return lk.Identity(1, b"i" * 16, False, dict.fromkeys(paths, b""), PROBE, path)


def make_hello(*paths: str) -> m.Hello:
    return m.Hello(
        m.PROTOCOL_VERSION, 2, b"j" * 16, False, True, 1000, dict.fromkeys(paths, b""), PROBE
    )


def make_welcome(*paths: str) -> m.Welcome:
    offers = dict.fromkeys(paths, b"")
    return m.Welcome(m.PROTOCOL_VERSION, 2, b"j" * 16, TOKEN, offers, PROBE)


def greeting_caller(*paths: str) -> lk.CallerLink:
    link = lk.CallerLink(make_identity(*paths))
    link.start(NONCE, is_fresh=True, timeout_ms=1000)
    return link


def agreeing_caller(*paths: str) -> lk.CallerLink:
    """A caller that has verified its first path."""
    link = greeting_caller(*paths)
    link.received(make_welcome(*paths))
    link.probed(paths[0], None, is_remarkable=False)
    return link


def offering_listener(*paths: str, path: str = "auto") -> lk.ListenerLink:
    link = lk.ListenerLink(make_identity(*paths, path=path), token=TOKEN)
    link.admit(make_hello(*paths), is_known=False)
    return link


def linked_listener() -> lk.ListenerLink:
    link = offering_listener("tcp")
    link.received(m.Ready("tcp"))
    link.probed("tcp", None, is_remarkable=False)
    return link


# -- candidates --


@pytest.mark.parametrize(
    ("mine", "theirs", "path", "expected"),
    [
        (["tcp", "nixl", "cma"], ["cma", "tcp", "nixl"], "auto", ["cma", "nixl", "tcp"]),
        (["tcp", "rdma", "cma", "nixl"], ["tcp", "cma", "rdma", "nixl"], "auto",
         ["cma", "rdma", "nixl", "tcp"]),
        (["cma", "tcp"], ["tcp"], "auto", ["tcp"]),
        (["cma", "tcp"], ["cma", "tcp"], "tcp", ["tcp"]),
        (["cma", "tcp"], ["tcp"], "cma", []),
        ([], ["tcp"], "auto", []),
    ],
)  # fmt: skip
def test_candidates_are_what_both_ends_offer_best_first(
    mine: list[str], theirs: list[str], path: str, expected: list[str]
) -> None:
    offers = [dict.fromkeys(names, b"") for names in (mine, theirs)]
    assert lk.candidates(offers[0], offers[1], path) == expected


# -- the caller --


def test_a_caller_begins_with_hello() -> None:
    link = lk.CallerLink(make_identity("nixl", "tcp"))
    hello = m.Hello(
        m.PROTOCOL_VERSION,
        1,
        b"i" * 16,
        False,
        True,
        1000,
        {"nixl": b"", "tcp": b""},
        PROBE,
        nonce=NONCE,
    )
    assert link.start(NONCE, is_fresh=True, timeout_ms=1000) == [act.Send(hello)]


def test_a_caller_proposes_a_path_only_when_it_has_verified_it() -> None:
    link = greeting_caller("tcp")
    assert link.received(make_welcome("tcp")) == [act.Probe("tcp")]
    assert link.probed("tcp", None, is_remarkable=False) == [act.Send(m.Ready("tcp"))]


def test_a_caller_tries_the_next_path_when_its_peer_cannot_use_one() -> None:
    link = agreeing_caller("nixl", "tcp")
    assert link.received(m.Unusable("nixl", "not allowed", False)) == [act.Probe("tcp")]
    assert link.rejected == [("nixl", "not allowed", False)]


def test_a_caller_without_a_path_left_says_what_it_tried() -> None:
    link = agreeing_caller("nixl")
    refusal, close = link.received(m.Unusable("nixl", "another user", True))
    assert isinstance(close, act.Close)
    assert close.status is LLMStatusCode.LLM_LINK_FAILED
    assert "nixl: another user" in close.reason
    assert refusal == act.Send(m.Refused(LLMStatusCode.LLM_LINK_FAILED, close.reason))


def test_a_caller_does_not_link_by_another_path_than_it_proposed() -> None:
    link = agreeing_caller("nixl", "tcp")
    link.received(m.Linked("tcp"))
    assert link.state is lk.State.CLOSED


@pytest.mark.parametrize("is_linked", [False, True])
def test_a_caller_dials_for_its_listener_as_soon_as_that_verifies_a_path(is_linked: bool) -> None:
    link = agreeing_caller("tcp")
    if is_linked:
        link.received(m.Linked("tcp"))
    assert link.received(m.DialBack(3)) == [act.Dial(3)]


def test_a_caller_does_not_dial_for_a_stranger() -> None:
    link = greeting_caller("tcp")
    assert act.Dial(3) not in link.received(m.DialBack(3))
    assert link.state is lk.State.CLOSED


# -- the listener --


def test_a_listener_answers_hello_with_its_offers_and_the_token_of_the_link() -> None:
    link = lk.ListenerLink(make_identity("tcp"), token=TOKEN)
    welcome = m.Welcome(m.PROTOCOL_VERSION, 1, b"i" * 16, TOKEN, {"tcp": b""}, PROBE)
    assert link.admit(make_hello("tcp"), is_known=False) == [act.Send(welcome)]


def test_a_listener_that_turns_a_caller_away_says_why() -> None:
    link = lk.ListenerLink(make_identity("tcp"), token=TOKEN)
    assert link.refuse(LLMStatusCode.LLM_LINK_FAILED, "no such group") == [
        act.Send(m.Refused(LLMStatusCode.LLM_LINK_FAILED, "no such group")),
        act.Close(LLMStatusCode.LLM_LINK_FAILED, "no such group"),
    ]
    assert link.state is lk.State.CLOSED


def test_a_listener_publishes_before_it_tells_the_caller() -> None:
    link = offering_listener("tcp")
    assert link.received(m.Ready("tcp")) == [act.Probe("tcp")]
    assert link.probed("tcp", None, is_remarkable=False) == [
        act.Publish("tcp"),
        act.Send(m.Linked("tcp")),
    ]


def test_a_listener_waits_for_another_path_after_one_that_fails() -> None:
    link = offering_listener("nixl", "tcp")
    link.received(m.Ready("nixl"))
    assert link.probed("nixl", "another user", is_remarkable=True) == [
        act.Send(m.Unusable("nixl", "another user", True))
    ]
    assert link.received(m.Ready("tcp")) == [act.Probe("tcp")]


def test_a_reason_of_any_length_fits_into_the_message_that_carries_it() -> None:
    link = offering_listener("nixl", "tcp")
    link.received(m.Ready("nixl"))
    [answer] = link.probed("nixl", "why " * 5000, is_remarkable=True)
    assert isinstance(answer, act.Send)
    assert m.decode(m.encode(answer.message)[m.HEADER.size :]) == answer.message


@pytest.mark.parametrize("path", ["nixl", "carrier pigeon"])
def test_a_listener_does_not_probe_a_path_that_it_does_not_allow(path: str) -> None:
    link = offering_listener("nixl", "tcp", path="tcp")
    [answer] = link.received(m.Ready(path))
    assert answer == act.Send(m.Unusable(path, "cluster 1 does not allow it", False))


def test_a_listener_dials_for_nobody() -> None:
    link = linked_listener()
    assert act.Dial(1) not in link.received(m.DialBack(1))
    assert link.state is lk.State.CLOSED


# -- both --


def test_a_message_out_of_turn_is_refused_and_named() -> None:
    link = offering_listener("tcp")
    refusal, close = link.received(m.Linked("tcp"))
    reason = "Linked is not expected while offered"
    assert close == act.Close(LLMStatusCode.LLM_FAILED, reason)
    assert refusal == act.Send(m.Refused(LLMStatusCode.LLM_FAILED, reason))


def test_a_probe_that_ends_after_the_link_did_changes_nothing() -> None:
    link = offering_listener("tcp")
    link.received(m.Ready("tcp"))
    link.timed_out("too late")
    assert link.probed("tcp", None, is_remarkable=False) == []
    assert link.state is lk.State.CLOSED


@pytest.mark.parametrize("refusal", [m.Refused(5, "no"), m.Refused(0, "no")])
def test_a_linked_end_that_is_refused_closes(refusal: m.Refused) -> None:
    link = linked_listener()
    [close] = link.received(refusal)
    assert isinstance(close, act.Close)
    assert close.status is LLMStatusCode.LLM_FAILED


def test_the_status_of_a_refusal_is_that_of_the_peer() -> None:
    link = greeting_caller("tcp")
    number = int(LLMStatusCode.LLM_ALREADY_LINK)
    assert link.received(m.Refused(number, "linked")) == [
        act.Close(LLMStatusCode.LLM_ALREADY_LINK, "linked")
    ]


def test_leaving_says_bye_and_waits() -> None:
    link = linked_listener()
    assert link.leave() == [act.Send(m.Bye())]
    assert link.state is lk.State.LEAVING


def test_a_bye_is_answered_when_transfers_have_ended() -> None:
    link = linked_listener()
    assert link.received(m.Bye()) == [act.Drain()]
    retract, answer, close = link.drained()
    assert retract == act.Retract()
    assert answer == act.Send(m.ByeDone())
    assert isinstance(close, act.Close)


@pytest.mark.parametrize("state", ["new", "offered", "probing", "closed"])
def test_what_is_not_linked_cannot_leave(state: str) -> None:
    link = lk.ListenerLink(make_identity("tcp"), token=TOKEN)
    if state != "new":
        link = offering_listener("tcp")
    if state == "probing":
        link.received(m.Ready("tcp"))
    if state == "closed":
        link.cut("it was cut")
    assert link.leave() == []
    assert link.state is lk.State(state)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (0, LLMStatusCode.LLM_FAILED),
        (0x5010B007, LLMStatusCode.LLM_NOT_YET_LINK),
        (0xFFFFFFFF, LLMStatusCode.LLM_FAILED),
        (4711, LLMStatusCode.LLM_FAILED),
        (2**64 - 1, LLMStatusCode.LLM_FAILED),
    ],
)
def test_the_number_of_a_refusal_is_a_status_and_never_success(
    number: int, status: LLMStatusCode
) -> None:
    assert lk.status_of(number) is status
