"""finalize while other threads are in the middle of calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edges.calling import Calling
from edges.user import (
    EMPTY,
    HALF,
    HOSTED,
    LATER,
    OWNED,
    SENT,
    SUCCESS,
    User,
    holds_only,
    never_holds,
    refill,
    start_owner,
    values_of,
)
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node, NodeProcess

ROUNDS = 8
#: what finalize may take after the calls' own time-out, on a busy machine
LAST_S = 3.0


VERBS = [("copy", "cma"), ("swap", "cma"), ("pull", "cma"), ("pull", "tcp"), ("push", "cma")]
VERBS += [("push", "tcp")]


@pytest.mark.parametrize(("verb", "path"), VERBS)
def test_a_call_ends_before_finalize_returns_and_nothing_is_written_after_it(
    node: Node, peer: NodeProcess, verb: str, path: str
) -> None:
    for _ in range(ROUNDS):
        user = User(node, path, peer.call(start_owner, path))
        calling = Calling(user, verb)
        assert calling.began.wait(10)
        with takes_at_most(LAST_S):
            node.datadist.finalize()
        found = user.into.copy()
        user.take_back()
        assert calling.ended_with() != SUCCESS
        assert user.is_left_alone()
        if verb == "push":
            assert never_holds(peer, LATER)
            assert not calling.succeeded or peer.call(values_of) == {SENT}
        elif calling.succeeded:
            into = found[:, HALF:] if verb == "copy" else found
            assert holds_only(into, {"copy": EMPTY, "swap": HOSTED, "pull": OWNED}[verb])
        node.stop()
        peer.call(type(node).stop)


@pytest.mark.parametrize("verb", ["pull", "push"])
def test_a_call_that_would_outlast_finalize_fails_and_nothing_comes_later(
    node: Node, peer: NodeProcess, verb: str
) -> None:
    """The network stands still in the middle of it, for longer than finalize waits."""
    port = peer.call(start_owner, "tcp", 60_000)
    with FaultProxy(port) as proxy:
        user = User(node, "tcp", proxy.port, 500)
        proxy.slow(1 << 20)
        calling = Calling(user, verb)
        assert calling.began.wait(10)
        proxy.stall()
        with takes_at_most(0.5 + LAST_S):
            node.datadist.finalize()
        user.take_back()
        assert calling.ended_with() != SUCCESS
        assert calling.succeeded == 0
        proxy.restore()
        assert user.is_left_alone()
        assert never_holds(peer, LATER)


def test_finalize_with_all_of_them_at_once(node: Node, peer: NodeProcess, path: str) -> None:
    for _ in range(3):
        user = User(node, path, peer.call(start_owner, path))
        threads = [Calling(user, verb) for verb in user.verbs for _ in range(2)]
        assert all(calling.began.wait(10) for calling in threads)
        with takes_at_most(5 + LAST_S):
            node.datadist.finalize()
        user.take_back()
        assert SUCCESS not in [calling.ended_with() for calling in threads]
        assert user.is_left_alone()
        assert never_holds(peer, LATER)
        node.stop()
        peer.call(type(node).stop)


def test_an_owner_that_is_finalized_while_it_is_pulled_from_and_pushed_to(
    node: Node, peer: NodeProcess, path: str
) -> None:
    """Nothing is written to its memory once finalize has returned, nor sent from it.

    A peer on the same host may have read of it before it saw that it is stale, and fails.
    """
    for _ in range(3):
        user = User(node, path, peer.call(start_owner, path))
        threads = [Calling(user, "pull"), Calling(user, "push")]
        assert all(calling.began.wait(10) for calling in threads)
        peer.call(finalize_and_take_back)
        assert SUCCESS not in [calling.ended_with() for calling in threads]
        assert all(peer.call(values_of) == {LATER} for _ in range(5))
        assert path == "cma" or LATER not in user.into
        node.stop()
        peer.call(type(node).stop)


def finalize_and_take_back(node: Node) -> None:
    with takes_at_most(LAST_S):
        node.datadist.finalize()
    refill(node, LATER)
