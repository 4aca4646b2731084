"""Shares: parties have the threads of a pool by turns, and none has more than its bound."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from llm_datadist.errors import LLMException
from llm_datadist.running.deadline import Deadline
from llm_datadist.running.loop import RoundsLoop
from llm_datadist.running.shares import LoopShares, Shares
from llm_datadist.running.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 10.0


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads(4, "shared")
    yield threads
    threads.end(Deadline.after(PATIENCE_S))


def hold(shares: Shares, party: str, count: int) -> tuple[threading.Semaphore, threading.Event]:
    """Starts so much work of a party's that lasts until the event; the semaphore counts begun."""
    begun, end = threading.Semaphore(0), threading.Event()

    def work() -> None:
        begun.release()
        end.wait(PATIENCE_S)

    for _ in range(count):
        shares.start(party, work)
    return begun, end


def test_a_party_has_no_more_threads_than_its_bound(threads: Threads) -> None:
    shares = Shares(threads, 3)
    begun, end = hold(shares, "greedy", 20)
    for _ in range(3):
        assert begun.acquire(timeout=PATIENCE_S)
    others = threading.Event()
    shares.start("modest", others.set)
    assert others.wait(PATIENCE_S)
    assert not begun.acquire(blocking=False)
    end.set()
    for _ in range(17):
        assert begun.acquire(timeout=PATIENCE_S), "what waited is done in the end"


def test_parties_have_turns(threads: Threads) -> None:
    shares = Shares(threads, 4)
    begun, end = hold(shares, "holder", 4)
    for _ in range(4):
        assert begun.acquire(timeout=PATIENCE_S)
    done: list[str] = []
    last = threading.Semaphore(0)
    lock = threading.Lock()

    def work(party: str) -> None:
        with lock:
            done.append(party)
        last.release()

    for party in ["first"] * 40 + ["second"] * 2 + ["third"]:
        shares.start(party, lambda party=party: work(party))  # type: ignore[misc]
    end.set()
    for _ in range(43):
        assert last.acquire(timeout=PATIENCE_S)
    assert done.index("third") < 10, "it did not wait for all that came before"
    assert [i for i, party in enumerate(done) if party == "second"][1] < 15


def test_work_that_raises_keeps_nobody_else_from_the_thread() -> None:
    threads = Threads(1, "shared")
    shares = Shares(threads, 1)
    done = threading.Event()

    def fail() -> None:
        raise ValueError("its own")

    shares.start("a", fail)
    shares.start("a", done.set)
    assert done.wait(PATIENCE_S)
    threads.end(Deadline.after(PATIENCE_S))


def test_work_that_no_thread_takes_is_never_done() -> None:
    threads = Threads(1, "shared")
    shares = Shares(threads, 1)
    threads.end(Deadline.after(PATIENCE_S))
    with pytest.raises(LLMException):
        shares.start("a", lambda: pytest.fail("it was done"))


def test_the_loop_has_one_turn_a_round_for_each_party() -> None:
    loop = RoundsLoop()
    shares, done = LoopShares(loop), list[str]()

    def work(party: str, left: int) -> None:
        done.append(party)
        if left:
            shares.start(party, lambda: work(party, left - 1))

    def round_begins() -> None:
        done.append("|")
        if done.count("|") < 6:
            loop.call_soon(round_begins)
        else:
            loop.stop()

    def begin() -> None:
        for party in ("greedy", "greedy", "greedy", "modest"):
            shares.start(party, lambda party=party: work(party, 0))  # type: ignore[misc]
        shares.start("busy", lambda: work("busy", 2))

    loop.call_soon(round_begins)
    loop.call_soon(begin)
    loop.run_forever()
    rounds = "".join(f"{each[0]}" for each in done).split("|")[1:]
    assert [sorted(each) for each in rounds] == [
        ["b", "g", "m"],
        ["b", "g"],
        ["b", "g"],
        [],
        [],
        [],
    ]
    shares.start("greedy", lambda: done.append("again"))
    assert done[-1] == "again", "who has no turn behind it has one at once"
    loop.close()


def test_work_of_the_loop_that_raises_keeps_nobody_else_from_a_turn() -> None:
    loop = RoundsLoop()
    logged, done = list[object](), list[str]()
    loop.set_exception_handler(lambda _, context: logged.append(context["exception"]))
    shares, error = LoopShares(loop), ValueError("its own")

    def fail() -> None:
        raise error

    def begin() -> None:
        shares.start("a", lambda: done.append("first"))
        shares.start("a", fail)
        shares.start("a", lambda: done.append("last"))
        shares.start("a", loop.stop)

    loop.call_soon(begin)
    loop.run_forever()
    loop.close()
    assert done == ["first", "last"]
    assert logged == [error]
