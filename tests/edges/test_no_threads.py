"""A limit on processes: calls say so, or do with the threads that there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edges.interrupting import Ready
from edges.scarce import become_nobody, lift_limit, limit_threads
from edges.user import (
    EVERY,
    HALF,
    HOSTED,
    KEY,
    LATER,
    OWNED,
    SENT,
    SUCCESS,
    User,
    has,
    holds_only,
    never_holds,
    refill,
    start_owner,
    values_of,
)
from llm_datadist import LLMException, TransferWithCacheKeyConfig
from llm_datadist.testing.cluster import NodeProcess
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

OWNER, USER = 23471, 23472
SOON_S = 2.0


def start_user(node: Node, path: str, port: int, uid: int) -> None:
    become_nobody(uid)
    node.user = User(node, path, port)  # type: ignore[attr-defined]  # of these tests


def user_of(node: Node) -> User:
    user: User = node.user  # type: ignore[attr-defined]
    return user


def start_poor_owner(node: Node, path: str, uid: int) -> int:
    become_nobody(uid)
    return start_owner(node, path)


def pull_and_copy_within(node: Node, more: int) -> None:
    """Right bytes, with as few threads."""
    user = user_of(node)
    user.into[:] = 0
    limit_threads(more)
    user.pull()
    assert holds_only(user.into, OWNED)
    user.into[:, HALF:] = 0
    user.copy()
    assert holds_only(user.into, OWNED)
    user.swap()
    assert holds_only(user.into, HOSTED)


@pytest.mark.parametrize("more", [0, 1, 2])
def test_pulls_and_copies_work_with_the_threads_that_there_are(
    path: str, more: int, victim: NodeProcess
) -> None:
    uid = USER + more
    with NodeProcess() as owner:
        port = owner.call(start_poor_owner, path, uid if path == "cma" else OWNER)
        victim.call(start_user, path, port, uid)
        for _ in range(3):
            victim.call(pull_and_copy_within, more)


def transfer(node: Node) -> str:
    """A layer-wise transfer of all; what its start raised."""
    user = user_of(node)
    config = TransferWithCacheKeyConfig(KEY, range(1), range(1))
    try:
        task = user.manager.transfer_cache_async(user.source, Ready(), [config], EVERY, EVERY)
    except LLMException as error:
        return str(error)
    assert task.synchronize(10_000) == SUCCESS
    return ""


def transfer_without_threads(node: Node) -> str:
    limit_threads()
    said = transfer(node)
    user_of(node).take_back()
    return said


def send_again(node: Node) -> str:
    lift_limit()
    user = user_of(node)
    user.array_of(user.source)[:] = SENT
    return transfer(node)


def test_a_transfer_that_gets_no_thread_says_so_and_is_not_done_later(
    path: str, victim: NodeProcess
) -> None:
    with NodeProcess() as owner:
        port = owner.call(start_poor_owner, path, USER if path == "cma" else OWNER)
        victim.call(start_user, path, port, USER)
        said = victim.call(transfer_without_threads)
        assert "no more threads" in said
        assert "ulimit" in said
        assert never_holds(owner, LATER)
        assert owner.call(values_of) == {OWNED}
        assert victim.call(send_again) == ""
        assert owner.call(has, SENT)


def limit(node: Node) -> None:
    limit_threads()


def lift(node: Node) -> None:
    lift_limit()


def ask(node: Node, verb: str) -> str:
    """What a pull or push of all blocks ends with, at once."""
    with takes_at_most(SOON_S):
        try:
            user_of(node).verbs[verb]()
        except LLMException as error:
            return str(error)
    return ""


def test_an_owner_without_threads_answers_at_once_and_recovers(victim: NodeProcess) -> None:
    with NodeProcess() as owner:
        port = owner.call(start_poor_owner, "tcp", OWNER)
        victim.call(start_user, "tcp", port, USER)
        owner.call(limit)
        assert "no more threads" in victim.call(ask, "push")
        assert victim.call(ask, "pull") == ""
        assert owner.call(values_of) == {OWNED}
        owner.call(lift)
        assert owner.call(values_of) == {OWNED}, "the push that failed is not done later"
        assert victim.call(ask, "push") == ""
        assert owner.call(values_of) == {SENT}
        owner.call(refill, OWNED)
        assert victim.call(ask, "pull") == ""


def start_and_end_within(node: Node, path: str, port: int, more: int) -> str:
    """A life of a cluster in which there may be no thread for anything; what was said."""
    limit_threads(more)
    try:
        User(node, path, port).pull()
        return ""
    except (LLMException, AssertionError) as error:
        return str(error) or "it could not be linked"
    finally:
        lift_limit()
        with takes_at_most(SOON_S + 1):
            node.stop()


def test_a_cluster_that_starts_without_threads_says_so_and_starts_later(
    path: str, victim: NodeProcess
) -> None:
    with NodeProcess() as owner:
        uid = USER if path == "cma" else OWNER
        port = owner.call(start_poor_owner, path, uid)
        victim.call(start_user, path, port, USER)
        victim.call(stop)
        for more in range(1, 8):  # none at all: found_init_without_threads.py.txt
            said = victim.call(start_and_end_within, path, port, more)
            assert said == "" or "no more threads" in said or "could not be linked" in said
        assert victim.call(start_and_end_within, path, port, 1000) == ""


def stop(node: Node) -> None:
    del node.user  # type: ignore[attr-defined]
    node.stop()
