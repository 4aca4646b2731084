"""core.link: a caller and a listener against each other, whatever happens and in whatever order."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from link_pair import EVENTS, Pair, make_identity
from wire_messages import messages

from llm_datadist.core import link as lk
from llm_datadist.core import link_actions as act
from llm_datadist.core import messages as m
from llm_datadist.errors import LLMStatusCode

State = lk.State
LINKED = (State.LINKED, State.LINKED)
CLOSED = (State.CLOSED, State.CLOSED)

examples = settings(max_examples=100, deadline=None)

PATHS = ("cma", "rdma", "nixl", "tcp")  # best first; "rdma" is one that core.link does not know
paths = st.lists(st.sampled_from(PATHS), unique=True)
failures = st.frozensets(st.sampled_from(PATHS), max_size=2)
settings_of_path = st.sampled_from(["auto", "auto", "auto", *PATHS])


sides = st.sampled_from([0, 1])
#: what happens when two ends link: Hello, Welcome, a probe, Ready, a probe, Linked
HAND_SHAKE_STEPS = 6


def statuses(pair: Pair) -> list[LLMStatusCode | None]:
    return [end.close.status if end.close else None for end in pair.ends]


def make_pair() -> Pair:
    return Pair(make_identity(1, PATHS[1:]), make_identity(2, PATHS[1:]))


def linked_pair() -> Pair:
    pair = make_pair()
    pair.settle()
    assert pair.states == LINKED
    return pair


def pair_after(steps: int) -> Pair:
    """A pair on its way, HAND_SHAKE_STEPS of which make a link."""
    pair = make_pair()
    for _ in range(steps):
        assert pair.step()
    return pair


# -- which path a link takes --


@examples
@given(
    offered=st.tuples(paths, paths),
    allowed=st.tuples(settings_of_path, settings_of_path),
    failing=st.tuples(failures, failures),
)
def test_a_link_takes_the_best_path_that_both_ends_offer_allow_and_verify(
    offered: tuple[list[str], list[str]],
    allowed: tuple[str, str],
    failing: tuple[frozenset[str], frozenset[str]],
) -> None:
    caller, listener = (
        make_identity(index + 1, offered[index], path=allowed[index]) for index in range(2)
    )
    pair = Pair(caller, listener, failing=failing)
    pair.settle()
    usable = [
        path
        for path in PATHS
        if all(
            path in offered[end] and allowed[end] in ("auto", path) and path not in failing[end]
            for end in range(2)
        )
    ]
    expected = usable[0] if usable else None
    if expected == lk.SAME_HOST:
        assert statuses(pair) == [LLMStatusCode.LLM_SUCCESS] * 2
        pair = Pair(caller, listener, failing=failing, is_same_host=True)
        pair.settle()
    assert [end.published for end in pair.ends] == [expected, expected]
    if usable:
        assert pair.states == LINKED
    else:
        assert statuses(pair) == [LLMStatusCode.LLM_LINK_FAILED] * 2


@examples
@given(failing=st.tuples(failures, failures))
def test_the_caller_knows_why_every_better_path_is_not_used(
    failing: tuple[frozenset[str], frozenset[str]],
) -> None:
    pair = Pair(make_identity(1, PATHS), make_identity(2, PATHS), failing=failing)
    pair.settle()
    path = "cma" if pair.caller.has_met else pair.caller.published
    better = PATHS[: PATHS.index(path)] if path else PATHS
    rejected = pair.caller.link.rejected
    assert rejected == [(name, "it fails", True) for name in better]


def test_both_ends_learn_who_the_other_one_is() -> None:
    pair = linked_pair()
    for end, peer in (pair.ends, pair.ends[::-1]):
        me = peer.link.me
        assert end.link.peer == lk.Peer(me.cluster_id, me.instance, me.offers, me.probe)


def test_the_caller_learns_the_token_of_the_listener() -> None:
    pair = linked_pair()
    assert pair.caller.link.token == pair.listener.link.token == b"t" * 16


def test_a_link_is_made_in_six_steps() -> None:
    assert make_pair().settle() == HAND_SHAKE_STEPS


def test_the_listener_publishes_before_the_caller_does() -> None:
    pair = make_pair()
    while pair.listener.published is None:
        assert pair.caller.published is None
        assert pair.step()
    assert pair.caller.published is None
    pair.settle()
    assert pair.caller.published == pair.listener.published


# -- ends that do not fit together --


@pytest.mark.parametrize("flag", [False, True])
def test_ends_that_differ_in_remote_access_do_not_link(flag: bool) -> None:
    pair = Pair(
        make_identity(1, PATHS, is_remote_accessible=flag),
        make_identity(2, PATHS, is_remote_accessible=not flag),
    )
    pair.settle()
    assert statuses(pair) == [LLMStatusCode.LLM_PARAM_INVALID] * 2


@pytest.mark.parametrize("version", [0, m.PROTOCOL_VERSION + 1])
def test_a_caller_of_another_version_is_refused_by_the_listener(version: int) -> None:
    pair = make_pair()
    hello = pair.listener.inbox.pop()
    assert hello is not None
    pair.listener.inbox.append(msgspec.structs.replace(hello, version=version))
    pair.settle()
    assert statuses(pair) == [LLMStatusCode.LLM_PARAM_INVALID] * 2


@pytest.mark.parametrize("version", [0, m.PROTOCOL_VERSION + 1])
def test_a_listener_of_another_version_is_refused_by_the_caller(version: int) -> None:
    pair = make_pair()
    pair.step()
    welcome = pair.caller.inbox.pop()
    assert isinstance(welcome, m.Welcome)
    pair.caller.inbox.append(msgspec.structs.replace(welcome, version=version))
    pair.settle()
    assert statuses(pair) == [LLMStatusCode.LLM_PARAM_INVALID] * 2


def test_a_caller_that_knows_its_link_is_told_that_it_is_linked_already() -> None:
    pair = Pair(make_identity(1, PATHS), make_identity(2, PATHS), is_known=True, is_fresh=False)
    pair.settle()
    assert statuses(pair) == [LLMStatusCode.LLM_ALREADY_LINK] * 2


@pytest.mark.shows("link.again_after_crash")
def test_a_caller_that_forgot_its_link_gets_a_new_one() -> None:
    tcp = PATHS[-1:]
    pair = Pair(make_identity(1, tcp), make_identity(2, tcp), is_known=True, is_fresh=True)
    pair.settle()
    assert pair.states == LINKED


# -- ends of one host --


@pytest.mark.parametrize("side", [0, 1])
def test_what_is_said_on_the_first_connection_makes_no_link_over_the_same_host(side: int) -> None:
    pair = Pair(make_identity(1, PATHS), make_identity(2, PATHS))
    pair.step()
    end = pair.ends[side]
    said: m.Message = m.Linked(lk.SAME_HOST) if side == 0 else m.Ready(lk.SAME_HOST)
    end.perform(end.link.received(said))
    pair.settle()
    assert [end.published for end in pair.ends] == [None, None]
    assert not pair.listener.verified


def test_another_process_than_the_one_that_was_called_is_no_peer() -> None:
    pair = Pair(make_identity(1, PATHS), make_identity(2, PATHS), is_same_host=True)
    assert isinstance(pair.caller.link, lk.CallerLink)
    pair.caller.link.expected = b"who was reached."
    pair.settle()
    assert statuses(pair) == [LLMStatusCode.LLM_LINK_FAILED] * 2


def test_a_first_connection_that_breaks_while_the_ends_meet_is_not_missed() -> None:
    pair = Pair(make_identity(1, PATHS), make_identity(2, PATHS))
    pair.step()
    pair.caller.happens("deliver")
    pair.caller.happens("lost")
    pair.caller.happens("met")
    assert pair.caller.has_met
    assert statuses(pair)[0] is LLMStatusCode.LLM_SUCCESS


# -- what goes wrong on the way --


@pytest.mark.shows("link.both_rolled_back")
@pytest.mark.parametrize("steps", range(HAND_SHAKE_STEPS))
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("lost", LLMStatusCode.LLM_FAILED),
        ("timed_out", LLMStatusCode.LLM_TIMEOUT),
        ("cut", LLMStatusCode.LLM_NOT_YET_LINK),
    ],
)
def test_a_hand_shake_that_ends_anywhere_on_the_way_leaves_no_half_of_a_link(
    steps: int, side: int, fault: str, status: LLMStatusCode
) -> None:
    pair = pair_after(steps)
    end = pair.ends[side]
    was_published = end.published is not None
    end.happens(fault)
    pair.settle()
    assert pair.states == CLOSED
    if not was_published:
        assert statuses(pair)[side] is status


@pytest.mark.parametrize("side", [0, 1])
def test_a_link_whose_connection_breaks_ends_as_not_linked_on_both_ends(side: int) -> None:
    pair = linked_pair()
    pair.ends[side].happens("lost")
    pair.settle()
    assert statuses(pair) == [LLMStatusCode.LLM_NOT_YET_LINK] * 2


happenings = st.lists(
    st.tuples(sides, st.sampled_from(["deliver", "probed", "drained", *EVENTS])),
    max_size=40,
)


@settings(examples, max_examples=200)
@given(failing=st.tuples(failures, failures), is_linked=st.booleans(), what=happenings)
def test_in_any_order_of_events_both_ends_end_alike_and_publish_alike(
    failing: tuple[frozenset[str], frozenset[str]], is_linked: bool, what: list[tuple[int, str]]
) -> None:
    """The executor checks in passing: nothing after a Close, no Publish without a Probe."""
    if is_linked:
        pair = linked_pair()
    else:
        pair = Pair(make_identity(1, PATHS), make_identity(2, PATHS), failing=failing)
    for side, happening in what:
        pair.ends[side].happens(happening)
        published = [end.published for end in pair.ends]
        assert published[0] in (None, published[1])
    pair.settle()
    event(f"{pair.states}")
    assert pair.states in (LINKED, CLOSED)


# -- unlinking --


@pytest.mark.parametrize("sides", [[0], [1], [0, 1], [1, 0]])
def test_a_link_that_either_end_or_both_leave_ends_on_both(sides: list[int]) -> None:
    pair = linked_pair()
    for side in sides:
        pair.ends[side].happens("leave")
    pair.settle()
    assert statuses(pair) == [LLMStatusCode.LLM_NOT_YET_LINK] * 2


@pytest.mark.parametrize("side", [0, 1])
def test_the_one_who_leaves_is_kept_until_the_peer_has_drained(side: int) -> None:
    pair = linked_pair()
    leaver, peer = pair.ends[side], pair.ends[1 - side]
    leaver.happens("leave")
    peer.happens("deliver")
    assert (leaver.link.state, peer.link.state) == (State.LEAVING, State.LINKED)
    peer.happens("drained")
    leaver.happens("deliver")
    assert pair.states == CLOSED


@pytest.mark.parametrize("side", [0, 1])
def test_the_one_who_gave_up_leaving_keeps_its_link(side: int) -> None:
    pair = linked_pair()
    pair.ends[side].happens("leave")
    pair.ends[side].happens("stay")
    assert pair.states == LINKED


@pytest.mark.parametrize("side", [0, 1])
def test_a_late_consent_still_ends_the_link_on_both_ends(side: int) -> None:
    pair = linked_pair()
    pair.ends[side].happens("leave")
    pair.ends[side].happens("stay")
    pair.settle()
    assert statuses(pair) == [LLMStatusCode.LLM_NOT_YET_LINK] * 2


@examples
@given(
    first=sides,
    what=st.lists(
        st.tuples(sides, st.sampled_from(["leave", "stay", "deliver", "drained"])), max_size=30
    ),
)
def test_leaving_and_staying_in_any_order_on_both_ends_ends_the_link(
    first: int, what: list[tuple[int, str]]
) -> None:
    pair = linked_pair()
    pair.ends[first].happens("leave")
    for side, happening in what:
        pair.ends[side].happens(happening)
    pair.settle()
    assert statuses(pair) == [LLMStatusCode.LLM_NOT_YET_LINK] * 2


# -- a peer that says anything at all --


likely = st.sampled_from(
    [
        m.Welcome(m.PROTOCOL_VERSION, 2, b"i" * 16, b"t" * 16, {"tcp": b"", "cma": b""},
                  m.ProbeTarget(1, b"n" * 16, 2, 3)),
        m.Ready("tcp"),
        m.Ready("nonsense"),
        m.Linked("cma"),
        m.Linked("tcp"),
        m.Unusable("cma", "why not", True),
        m.DialBack(3),
        m.Bye(),
        m.ByeDone(),
        m.Refused(0, "a refusal with the status of success"),
        m.Ready("p" * 4096),
        m.Unusable("p" * 4096, "r" * 4096, True),
    ]
)  # fmt: skip


@settings(examples, max_examples=200)
@given(
    side=sides,
    steps=st.integers(0, HAND_SHAKE_STEPS),
    what=st.lists(messages | likely | st.sampled_from(EVENTS), max_size=15),
)
def test_no_message_and_no_event_in_any_state_breaks_the_machine(
    side: int, steps: int, what: list[m.Message | str]
) -> None:
    """The executor checks in passing: nothing after a Close, no Publish without a Probe."""
    end = pair_after(steps).ends[side]
    for happening in what:
        event(f"{end.link.state}")
        if isinstance(happening, str):
            end.happens(happening)
        else:
            end.perform(end.link.received(happening))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("steps", range(1, HAND_SHAKE_STEPS + 1))
@pytest.mark.parametrize("number", [0, 2**64 - 1, 12345])
def test_a_refusal_without_a_status_of_ours_is_a_failure_and_never_success(
    side: int, steps: int, number: int
) -> None:
    end = pair_after(steps).ends[side]
    end.perform(end.link.received(m.Refused(number, "no")))
    assert end.close == act.Close(LLMStatusCode.LLM_FAILED, "no")


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("happening", EVENTS)
def test_a_closed_link_stays_closed_whatever_is_tried(side: int, happening: str) -> None:
    end = linked_pair().ends[side]
    end.happens("cut")
    assert end.link.state is State.CLOSED
    end.happens(happening)
    assert end.link.state is State.CLOSED
