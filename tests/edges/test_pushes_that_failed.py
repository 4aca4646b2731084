"""A push that failed at its sender is over: nothing of it lands once a later one has succeeded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edges.user import (
    OWNED,
    SENT,
    SUCCESS,
    User,
    refill,
    start_owner,
    status_of,
    values_of,
)
from llm_datadist import LLMStatusCode
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node, NodeProcess

TIMEOUT = LLMStatusCode.LLM_TIMEOUT
TIMEOUT_MS = 400
SOON_S = 2.0
#: what is pushed second
SECOND = 0x22
#: so often the owner looks at memory that must not change any more
LOOKS = 10


def push_again(user: User, peer: NodeProcess) -> None:
    """A push of other bytes succeeds, and they stay."""
    user.array_of(user.source)[:] = SECOND
    for _ in range(20):  # the first may still be under way, and is waited for or the link replaced
        status = status_of(user.push)
        if status == SUCCESS:
            break
        assert status in (TIMEOUT, LLMStatusCode.LLM_NOT_YET_LINK), status
    assert status == SUCCESS
    assert all(peer.call(values_of) == {SECOND} for _ in range(LOOKS))


@pytest.mark.parametrize("how", ["slow", "stall"])
def test_a_push_over_a_bad_network_does_not_overwrite_its_successor(
    node: Node, peer: NodeProcess, how: str
) -> None:
    with FaultProxy(peer.call(start_owner, "tcp", 60_000)) as proxy:
        user = User(node, "tcp", proxy.port, TIMEOUT_MS)
        user.push()
        for _ in range(3):
            peer.call(refill, OWNED)
            user.array_of(user.source)[:] = SENT
            proxy.slow(1 << 20)
            if how == "stall":
                proxy.stall()
            with takes_at_most(TIMEOUT_MS / 1000 + SOON_S):
                assert status_of(user.push) == TIMEOUT
            proxy.restore()
            push_again(user, peer)


def test_a_push_to_a_peer_that_stands_still_does_not_overwrite_its_successor(
    node: Node, victim: NodeProcess, path: str
) -> None:
    user = User(node, path, victim.call(start_owner, path, 60_000), TIMEOUT_MS)
    user.push()
    for _ in range(3):
        victim.call(refill, OWNED)
        user.array_of(user.source)[:] = SENT
        victim.pause()
        with takes_at_most(TIMEOUT_MS / 1000 + SOON_S):
            assert status_of(user.push) == TIMEOUT
        user.array_of(user.source)[:] = SECOND  # the memory is the program's again
        victim.resume()
        push_again(user, victim)


def test_what_is_pushed_of_a_cache_that_is_gone_never_arrives(
    node: Node, victim: NodeProcess, path: str
) -> None:
    """The source is given back after the push failed, and holds something else."""
    user = User(node, path, victim.call(start_owner, path, 60_000), TIMEOUT_MS)
    user.push()
    victim.call(refill, OWNED)
    victim.pause()
    assert status_of(user.push) == TIMEOUT
    user.manager.unregister_cache(user.source.cache_id)
    user.take_back()
    victim.resume()
    assert all(victim.call(values_of) <= {OWNED, SENT} for _ in range(LOOKS))
    assert user.is_left_alone()


def test_a_push_that_an_unlinking_by_force_ends_does_not_overwrite_its_successor(
    node: Node, peer: NodeProcess
) -> None:
    with FaultProxy(peer.call(start_owner, "tcp", 60_000)) as proxy:
        user = User(node, "tcp", proxy.port, TIMEOUT_MS)
        proxy.slow(1 << 20)
        assert status_of(user.push) == TIMEOUT
        assert node.unlink(proxy.port, 1, force=True) == SUCCESS
        proxy.restore()
        assert node.link(proxy.port, 1) == SUCCESS
        push_again(user, peer)
