"""Calls that an exception of a signal's handler strikes: Ctrl-C, a test's time-out."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

import effort
from edges.interrupting import interrupts, run
from edges.user import LATER, User, has, never_holds, refill, start_owner, status_of
from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node, NodeProcess

COUNT = effort.rounds(600)
#: a call that is cut short ends soon, on a busy machine
SOON_S = 2.0

CALLS = [
    pytest.param(["pull", "pull some"], id="pulls"),
    pytest.param(["push", "wait for layers"], id="pushes"),
    pytest.param(["copy", "swap", "register", "links"], id="at-home"),
    pytest.param(["link"], id="links"),
    pytest.param(["pull", "push", "copy", "register", "link", "wait for layers"], id="all"),
]


@pytest.mark.parametrize("names", CALLS)
def test_after_hundreds_of_interruptions_all_is_as_before(
    peer: NodeProcess, victim: NodeProcess, path: str, names: list[str]
) -> None:
    port = peer.call(start_owner, path)
    count = effort.rounds(100) if "link" in names else COUNT
    victim.begin(run, path, port, names, count)
    found = victim.result(60)
    assert found == (count, [], [])


@pytest.mark.parametrize("verb", ["pull", "push"])
def test_a_pull_or_push_that_is_interrupted_while_it_waits_leaves_nothing_behind(
    peer: NodeProcess, victim: NodeProcess, verb: str
) -> None:
    """Its helpers wait for a network that stands still; later it goes on."""
    with FaultProxy(peer.call(start_owner, "tcp", 60_000)) as proxy:
        victim.call(start_user, proxy.port)
        victim.call(open_streams)
        before = proxy.nbytes_passed(to_caller=verb == "pull")
        proxy.slow(1 << 20)
        victim.begin(interrupt_in_the_middle, verb)
        while proxy.nbytes_passed(to_caller=verb == "pull") < before + (1 << 16):
            pass
        proxy.stall()
        os.kill(victim.pid, signal.SIGALRM)
        assert victim.result(10) == "Interrupted"
        proxy.restore()
        assert victim.call(is_left_alone)
        assert never_holds(peer, LATER)


def start_user(node: Node, port: int) -> None:
    node.user = User(node, "tcp", port, 60_000)  # type: ignore[attr-defined]  # of this test's


def open_streams(node: Node) -> None:
    """As many as a call has helpers."""
    user: User = node.user  # type: ignore[attr-defined]
    user.pull()
    user.push()


def interrupt_in_the_middle(node: Node, verb: str) -> str:
    """How the call ended; its caches can be unregistered at once then."""
    user: User = node.user  # type: ignore[attr-defined]
    how = ""
    with interrupts():
        try:
            user.verbs[verb]()
        except Exception as error:
            how = type(error).__name__
    with takes_at_most(SOON_S):
        for cache in (user.sink, user.source):
            user.manager.unregister_cache(cache.cache_id)
    user.take_back()
    return how


def is_left_alone(node: Node) -> bool:
    user: User = node.user  # type: ignore[attr-defined]
    return user.is_left_alone()


@pytest.mark.parametrize("verb", ["pull", "push"])
def test_after_a_deadline_nothing_is_written(node: Node, peer: NodeProcess, verb: str) -> None:
    with FaultProxy(peer.call(start_owner, "tcp", 60_000)) as proxy:
        user = User(node, "tcp", proxy.port, 300)
        proxy.slow(1 << 20)
        with takes_at_most(0.3 + SOON_S):
            assert status_of(user.verbs[verb]) == LLMStatusCode.LLM_TIMEOUT
        user.take_back()
        proxy.restore()
        assert user.is_left_alone()
        assert never_holds(peer, LATER)


def test_ctrl_c_in_a_pull_of_many_parts_leaves_the_cache_to_its_owner(
    peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    victim.call(start_plain_user, path, peer.call(start_owner, path))
    for _ in range(20):
        victim.begin(pull_until_ctrl_c)
        assert victim.result(20) == "KeyboardInterrupt"
        assert victim.call(is_left_alone)
    assert peer.call(has, 0x77)


def start_plain_user(node: Node, path: str, port: int) -> None:
    node.user = User(node, path, port)  # type: ignore[attr-defined]


def pull_until_ctrl_c(node: Node) -> str:
    user: User = node.user  # type: ignore[attr-defined]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    pulled = threading.Event()

    def press() -> None:
        pulled.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    how = ""
    try:
        while True:
            user.pull()
            pulled.set()
    except (KeyboardInterrupt, LLMException) as error:
        how = type(error).__name__
    finally:
        signal.signal(signal.SIGINT, before)
    user.take_back()
    return how


def test_refilling_is_seen(peer: NodeProcess) -> None:
    """What the tests above look for would be found."""
    peer.call(start_owner, "tcp")
    peer.call(refill, LATER)
    assert not never_holds(peer, LATER)
