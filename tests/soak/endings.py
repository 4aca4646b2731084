"""How things end, again and again: interruptions, limits, forks, finalize, pushes that failed."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edges.calling import Calling
from edges.interrupting import run
from edges.scarce import become_nobody
from edges.test_forks import fork_while_threads_pull
from edges.test_no_threads import start_and_end_within
from edges.user import (
    LATER,
    OWNED,
    SENT,
    SUCCESS,
    User,
    has,
    refill,
    start_owner,
    status_of,
    values_of,
)
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually
from soak.tally import descriptors, threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from soak.tally import Tally

PATHS = ("cma", "tcp")
#: interruptions and forks of one process, before the next one takes over
CHUNK = 200
ALL_CALLS = ["pull", "push", "copy", "register", "link", "wait for layers", "pull some", "swap"]
UID = 23480
PUSH_MS = 100
#: what finalize may take beyond the calls' time-out
LAST_S = 2.0
MEDIUM = (2, 16, 1 << 16)
SECOND = 0x22


@contextmanager
def no_leak(tally: Tally, pid: int | str = "self") -> Iterator[None]:
    """Descriptors and threads of a process are as many as before."""
    files, tasks = descriptors(pid), threads(pid)
    yield
    eventually(lambda: descriptors(pid) <= files and threads(pid) <= tasks)
    tally.leak("file descriptors", files, descriptors(pid))
    tally.leak("threads", tasks, threads(pid))


def interruptions(rounds: int, tally: Tally) -> None:
    """Each round is a call that an exception of a signal's handler strikes."""
    while tally.rounds < rounds:
        for path in PATHS:
            count = min(CHUNK, max(1, rounds // 2))
            with NodeProcess() as owner, NodeProcess() as user:
                port = owner.call(start_owner, path)
                user.begin(run, path, port, ALL_CALLS, count, tally.seed + tally.rounds)
                found = user.result(60)
                if found != (count, [], []):
                    tally.failure(f"{path}: {found}")
                for _ in range(count):
                    tally.round()


def scarce_threads(rounds: int, tally: Tally) -> None:
    """Each round is a start, a pull and an end with a few threads, then one with all of them."""
    rng = random.Random(tally.seed)
    for path in PATHS:
        with NodeProcess() as owner, NodeProcess() as user:
            for process in (owner, user):
                process.call(give_up_root)
            port = owner.call(start_owner, path)
            user.call(start_and_end_within, path, port, 1000)
            with no_leak(tally, user.pid):
                for _ in range(max(1, rounds // len(PATHS))):
                    said = user.call(start_and_end_within, path, port, rng.randint(1, 8))
                    if said and "no more threads" not in said and "not be linked" not in said:
                        tally.failure(f"{path}, few threads: {said}")
                    said = user.call(start_and_end_within, path, port, 1000)
                    if said:
                        tally.failure(f"{path}, after the limit was lifted: {said}")
                    tally.round()


def give_up_root(_: Node) -> None:
    become_nobody(UID)


def forks(rounds: int, tally: Tally) -> None:
    """Each round is a fork by one thread while others pull; the child calls, and ends."""
    while tally.rounds < rounds:
        for path in PATHS:
            count = min(CHUNK, max(1, rounds // 2))
            with NodeProcess() as owner, NodeProcess() as parent:
                port = owner.call(start_owner, path, shape=MEDIUM)
                parent.begin(fork_while_threads_pull, path, port, count, MEDIUM)
                wrong = parent.result(120)
                if wrong:
                    tally.failure(f"{path}: {wrong}")
                for _ in range(count):
                    tally.round()


def finalizes(rounds: int, tally: Tally) -> None:
    """Each round is an end in the middle of calls of every kind; nothing is written after it."""
    rng = random.Random(tally.seed)
    node = Node()
    with NodeProcess() as owner:
        _finalize(node, owner, "tcp", rng, tally)  # opens what is opened once
        with no_leak(tally):
            for _ in range(rounds):
                _finalize(node, owner, rng.choice(PATHS), rng, tally)
                tally.round(tally.worst_over_s)


def _finalize(node: Node, owner: NodeProcess, path: str, rng: random.Random, tally: Tally) -> None:
    user = User(node, path, owner.call(start_owner, path, shape=MEDIUM), shape=MEDIUM)
    verbs = rng.sample(sorted(user.verbs), rng.randint(1, len(user.verbs)))
    calling = [Calling(user, verb) for verb in verbs for _ in range(rng.randint(1, 2))]
    for thread in calling:
        thread.began.wait(10)
    with tally.deadline(LAST_S):
        node.datadist.finalize()
    user.take_back()
    for thread in calling:
        if thread.ended_with() == SUCCESS:
            tally.failure(f"{path}: a call of {verbs} never ended")
    if not user.is_left_alone() or owner.call(has, LATER):
        tally.failure(f"{path}: bytes of {verbs} came after finalize had returned")
    node.stop()
    owner.call(Node.stop)


def revoked_pushes(rounds: int, tally: Tally) -> None:
    """Each round is a push that times out, and one behind it that succeeds and stays."""
    rng = random.Random(tally.seed)
    node = Node()
    with NodeProcess() as owner:
        for path in PATHS:
            port = owner.call(start_owner, path, 60_000, MEDIUM)
            with FaultProxy(port) as proxy:
                user = User(node, path, proxy.port, PUSH_MS, MEDIUM)
                user.push()
                for _ in range(max(1, rounds // len(PATHS))):
                    _revoke(user, owner, proxy, rng, tally)
                    tally.round(tally.worst_over_s)
                node.stop()
            owner.call(Node.stop)


def _revoke(
    user: User, owner: NodeProcess, proxy: FaultProxy, rng: random.Random, tally: Tally
) -> None:
    source = user.array_of(user.source)
    owner.call(refill, OWNED)
    source[:] = SENT
    is_slow = rng.random() < 0.5
    if is_slow:
        proxy.slow(rng.choice([1 << 16, 1 << 18, 1 << 20]))
    else:
        owner.pause()
    with tally.deadline(PUSH_MS / 1000):
        first = status_of(user.push)
    source[:] = SECOND
    proxy.restore() if is_slow else owner.resume()
    for _ in range(50):
        second = status_of(user.push)
        if second == SUCCESS:
            break
    if second != SUCCESS:
        tally.failure(f"after a push that ended with {first}: {second}")
    found = owner.call(values_of)
    if found != {SECOND} or owner.call(values_of) != {SECOND}:
        tally.failure(f"after a push that ended with {first}, and one that succeeded: {found}")
