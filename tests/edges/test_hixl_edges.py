"""Engines of `hixl` at their edges: forked, interrupted, without threads, finalized meanwhile."""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest

import effort
from edges.forking import in_child
from edges.interrupting import LONGEST_S, Strikes, interrupts, is_interrupted
from edges.scarce import become_nobody, lift_limit, limit_threads
from llm_datadist import hixl as h
from llm_datadist.testing.process import ObjectProcess
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READ, WRITE = h.TransferOp.READ, h.TransferOp.WRITE
#: interruptions that have to strike
FEW = 11
NBYTES = 8192
LONG_MS = 20_000
UID = 23473
FINALIZE_S = 8.0


class Pair:
    """Two engines of one process, one connected to the other, with memory."""

    def __init__(self, path: str) -> None:
        self.client, self.server = h.Hixl(), h.Hixl()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.name = f"127.0.0.1:{free.getsockname()[1]}"
        options = {"llm_datadist.Path": path}
        assert self.server.initialize(self.name, options) == h.SUCCESS
        assert self.client.initialize("127.0.0.1", options) == h.SUCCESS
        self.ours, self.theirs = (np.zeros(NBYTES, dtype=np.uint8) for _ in range(2))
        for hixl, array in ((self.client, self.ours), (self.server, self.theirs)):
            desc = h.MemDesc(array.ctypes.data, NBYTES)
            assert hixl.register_mem(desc, h.MemType.MEM_HOST)[0] == h.SUCCESS
        assert self.client.connect(self.name, LONG_MS) == h.SUCCESS

    @property
    def pieces(self) -> list[h.TransferOpDesc]:
        """Even addresses there, odd ones here."""
        ours, theirs = self.ours.ctypes.data, self.theirs.ctypes.data
        return [h.TransferOpDesc(ours + at, theirs + at, 64) for at in range(0, NBYTES, 128)]

    def move(self, op: h.TransferOp) -> int:
        return self.client.transfer_sync(self.name, op, self.pieces, LONG_MS)

    def is_right(self) -> bool:
        """Whether both ways bring the right bytes."""
        self.theirs[:], self.ours[:] = 1, 0
        if self.move(READ) != h.SUCCESS or int(self.ours.sum()) != NBYTES // 2:
            return False
        self.ours[:] = 3
        return self.move(WRITE) == h.SUCCESS and int(self.theirs.sum()) == 2 * NBYTES

    def end(self) -> None:
        self.client.finalize()
        self.server.finalize()


@pytest.fixture
def pair(path: str) -> Iterator[Pair]:
    made = Pair(path)
    yield made
    made.end()


@pytest.fixture
def apart(path: str) -> Iterator[ObjectProcess[Pair]]:
    """The same in a process whose main thread is the test's."""
    with ObjectProcess(Pair, path) as process:
        yield process


# -- forks --


@pytest.mark.shows("engine.finalize")
def test_a_forked_child_has_no_engine_and_harms_none(apart: ObjectProcess[Pair]) -> None:
    said = apart.call(fork_and_call)
    assert said == f"{h.FAILED} {h.FAILED} ({h.FAILED}, []) {h.SUCCESS} {h.SUCCESS}"
    assert apart.call(Pair.is_right)


def fork_and_call(pair: Pair) -> str:
    def calls() -> str:
        rets: list[object] = [
            pair.move(READ),
            pair.client.connect(pair.name),
            pair.client.get_notifies(),
        ]
        pair.client.finalize()
        rets.append(pair.client.initialize("127.0.0.7"))
        rets.append(pair.client.connect(pair.name, LONG_MS))
        pair.client.finalize()
        return " ".join(map(str, rets))

    return in_child(calls)


# -- signals --


@pytest.mark.shows("engine.transfer_sync", "engine.transfer_async")
@pytest.mark.parametrize(
    "call", ["read", "write", "begin", "register", "connect", "notify", "notices"]
)
def test_a_call_that_a_signal_interrupts_leaves_nothing(
    apart: ObjectProcess[Pair], call: str
) -> None:
    """Nothing arrives behind it, and the next calls work."""
    interrupted, wrong = apart.call(interrupt, call)
    assert interrupted >= FEW
    assert wrong == []


def is_connected_anew(pair: Pair) -> bool:
    """The peer may take a moment to notice that a call was interrupted."""
    pair.client.disconnect(pair.name, LONG_MS)
    return pair.client.connect(pair.name, LONG_MS) == h.SUCCESS


def interrupt(pair: Pair, name: str) -> tuple[int, list[str]]:
    logging.disable()  # what a handler raises there is lost, and hundreds of calls would be made
    rng, struck, wrong = random.Random(20261129), list[bool](), []
    spare = np.zeros(64, dtype=np.uint8)

    def register() -> None:
        ret, handle = pair.client.register_mem(h.MemDesc(spare.ctypes.data, 64), h.MemType.MEM_HOST)
        assert ret == h.SUCCESS
        assert pair.client.deregister_mem(handle) == h.SUCCESS

    def connect() -> None:
        pair.client.disconnect(pair.name, LONG_MS)
        pair.client.connect(pair.name, LONG_MS)

    def begin() -> None:
        pair.client.transfer_async(pair.name, READ, pair.pieces)

    def notices() -> None:
        pair.server.get_notifies()

    calls: dict[str, Callable[[], object]] = {
        "read": lambda: pair.move(READ),
        "write": lambda: pair.move(WRITE),
        "begin": begin,
        "register": register,
        "connect": connect,
        "notify": lambda: pair.client.send_notify(pair.name, h.NotifyDesc("a", "b"), LONG_MS),
        "notices": notices,
    }
    with interrupts():
        for _ in effort.rounds_until(150, struck, FEW):
            pair.ours[:], pair.theirs[:] = 3, 1
            if is_interrupted(calls[name], rng.uniform(0, LONGEST_S)):
                struck.append(True)
            if name in ("read", "write"):
                pair.ours[:], pair.theirs[:] = 7, 5
                # whatever was under way has ended: a look at both ends, and another one
                changed = pair.ours.sum() != 7 * NBYTES or pair.theirs.sum() != 5 * NBYTES
                if changed:
                    wrong.append("bytes moved behind the exception")
        if name == "connect" and not eventually(lambda: is_connected_anew(pair), 5):
            wrong.append("it cannot be connected again")
    if name == "begin":
        has_ended = eventually(
            lambda: all(
                each.status is not h.TransferStatus.WAITING
                for each in pair.client.get_all_transfer_status()[1]
            ),
            20,
        )
        if not has_ended:
            wrong.append("a request never ends")
    if not pair.is_right():
        wrong.append("it does not work any more")
    return len(struck), wrong


@pytest.mark.shows("engine.deregister_mem")
def test_memory_whose_deregistration_was_interrupted_can_be_used_again(
    apart: ObjectProcess[Pair],
) -> None:
    interrupted, failed = apart.call(interrupt_deregistrations)
    assert interrupted >= FEW
    assert failed == []


def interrupt_deregistrations(pair: Pair) -> tuple[int, list[int]]:
    """How many were interrupted, and the statuses behind them that are failures."""
    rng, strikes, client = random.Random(20261129), Strikes(), pair.client
    spare = np.zeros(64, dtype=np.uint8)
    addr, struck, failed = spare.ctypes.data, list[object](), list[int]()
    pieces = [h.TransferOpDesc(addr, pair.theirs.ctypes.data, 32)]
    for _ in effort.rounds_until(300, struck, FEW):
        _, handle = client.register_mem(h.MemDesc(addr, 64), h.MemType.MEM_HOST)
        came = strikes.within(partial(client.deregister_mem, handle), rng.uniform(0, 4e-4))
        if came is not None:
            struck.append(came)
        for nbytes in (64, 32):  # the range itself, and one that it would hide
            ret, again = client.register_mem(h.MemDesc(addr, nbytes), h.MemType.MEM_HOST)
            rets = ret, client.transfer_sync(pair.name, READ, pieces, LONG_MS)
            failed += [ret for ret in rets if ret != h.SUCCESS]
            client.deregister_mem(again)
    return len(struck), failed


@pytest.mark.shows("engine.disconnect")
def test_a_disconnect_that_was_interrupted_does_not_contradict_itself(
    apart: ObjectProcess[Pair],
) -> None:
    """Who is told ALREADY_CONNECTED behind it can move something."""
    interrupted, wrong = apart.call(interrupt_disconnects)
    assert interrupted >= FEW
    assert wrong == []


def interrupt_disconnects(pair: Pair) -> tuple[int, list[tuple[int, int]]]:
    """How many were interrupted; what `connect` and a transfer said behind one, if it is wrong."""
    rng, strikes, wrong = random.Random(20261129), Strikes(), list[tuple[int, int]]()
    struck = list[bool]()
    for _ in effort.rounds_until(200, struck, FEW):
        disconnect = partial(pair.client.disconnect, pair.name, LONG_MS)
        if strikes.within(disconnect, rng.uniform(0, 2e-3)) is not None:
            struck.append(True)
        rets = pair.client.connect(pair.name, LONG_MS), pair.move(READ)
        if rets[0] not in (h.SUCCESS, h.ALREADY_CONNECTED) or rets[1] != h.SUCCESS:
            wrong.append(rets)
    return len(struck), wrong


@pytest.mark.shows("engine.get_all_transfer_status", "engine.get_transfer_status")
@pytest.mark.parametrize("are_all_asked_for", [True, False])
def test_an_end_that_an_interrupted_call_did_not_tell_is_told_later(
    apart: ObjectProcess[Pair], are_all_asked_for: bool
) -> None:
    interrupted, lost = apart.call(interrupt_questions, are_all_asked_for)
    assert interrupted >= FEW
    assert lost == 0


def interrupt_questions(pair: Pair, are_all_asked_for: bool) -> tuple[int, int]:
    """How many were interrupted, and of how many requests nobody ever tells the end."""
    files = "hixl/requests.py", "running/threads.py", "running/bell.py"
    rng, strikes, client = random.Random(20261129), Strikes(files=files), pair.client
    struck, lost = list[bool](), 0
    for _ in effort.rounds_until(200, struck, FEW):
        left = {client.transfer_async(pair.name, READ, [])[1] for _ in range(50)}
        ask = partial(ask_for_all if are_all_asked_for else ask_for_each, client, left)
        for _ in range(5):
            if strikes.within(ask, rng.uniform(0, 4e-4)) is not None:
                struck.append(True)
        eventually(ask, 2)
        lost += len(left)
    return len(struck), lost


def ask_for_all(client: h.Hixl, left: set[int]) -> bool:
    """Whether all are over; those whose end was told are not left."""
    for each in client.get_all_transfer_status()[1]:
        if each.status is not h.TransferStatus.WAITING:
            left.discard(each.req)
    return not left


def ask_for_each(client: h.Hixl, left: set[int]) -> bool:
    """The same, by number."""
    for req in tuple(left):
        ret, status = client.get_transfer_status(req)
        if ret == h.SUCCESS and status is not h.TransferStatus.WAITING:
            left.discard(req)
    return not left


# -- scarcity --


@pytest.mark.shows("engine.transfer_async")
def test_without_threads_a_call_says_so_and_the_others_work(apart: ObjectProcess[Pair]) -> None:
    assert apart.call(call_without_threads) == (
        h.SUCCESS, (h.RESOURCE_EXHAUSTED, 0), h.RESOURCE_EXHAUSTED, [], {}, h.SUCCESS,
    )  # fmt: skip


def call_without_threads(pair: Pair) -> tuple[object, ...]:
    assert pair.is_right()
    become_nobody(UID)
    limit_threads()
    rets = (
        pair.move(READ),
        pair.client.transfer_async(pair.name, READ, pair.pieces),
        pair.client.connect_async(pair.name),
        pair.client.get_all_transfer_status()[1],
        pair.client.get_all_async_connect_status()[1],
    )
    lift_limit()
    ret, _ = pair.client.transfer_async(pair.name, READ, pair.pieces)
    return (*rets, ret)


# -- ends --


@pytest.mark.shows("engine.finalize")
def test_finalize_beside_calls_of_all_kinds(pair: Pair) -> None:
    """None hangs, and none has a false success afterwards."""
    is_over = threading.Event()
    failed: list[BaseException] = []

    def keep_on(call: Callable[[], object]) -> None:
        try:
            while not is_over.is_set():
                call()
        except BaseException as error:
            failed.append(error)

    client, name = pair.client, pair.name
    calls: list[Callable[[], object]] = [
        lambda: pair.move(READ),
        lambda: pair.move(WRITE),
        lambda: client.transfer_async(name, READ, pair.pieces),
        lambda: client.send_notify(name, h.NotifyDesc("a", "b")),
        lambda: (client.connect_async(name), client.disconnect_async("127.0.0.1:9")),
        client.get_all_transfer_status,
        pair.server.get_notifies,
    ]
    threads = [threading.Thread(target=keep_on, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    assert eventually(lambda: len(pair.server.get_notifies()[1]) > 0, 20)
    with takes_at_most(FINALIZE_S):
        client.finalize()
    pair.ours[:] = 9
    assert pair.move(READ) == h.FAILED
    assert int(pair.ours.sum()) == 9 * NBYTES
    is_over.set()
    for thread in threads:
        thread.join(20)
    assert failed == []
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.shows("engine.finalize")
def test_an_engine_that_is_being_finalized_has_not_run_out_of_anything(pair: Pair) -> None:
    """RESOURCE_EXHAUSTED would be: try again later."""
    rets: set[int] = set()
    array = np.zeros(64, dtype=np.uint8)
    pieces = [h.TransferOpDesc(array.ctypes.data, pair.theirs.ctypes.data, 8)]
    for _ in range(20):
        client = h.Hixl()
        assert client.initialize("127.0.0.1", {h.OPTION_AUTO_CONNECT: "1"}) == h.SUCCESS
        client.register_mem(h.MemDesc(array.ctypes.data, 64), h.MemType.MEM_HOST)
        has_begun = threading.Event()

        def keep_on(client: h.Hixl = client, has_begun: threading.Event = has_begun) -> None:
            while (ret := client.transfer_async(pair.name, READ, pieces)[0]) == h.SUCCESS:
                has_begun.set()
                client.get_all_transfer_status()
            rets.add(ret)

        thread = threading.Thread(target=keep_on)
        thread.start()
        assert has_begun.wait(20)
        client.finalize()
        thread.join(20)
    assert rets == {h.FAILED}


@pytest.mark.shows("engine.finalize")
def test_an_engine_begins_and_ends_again_and_again(pair: Pair) -> None:
    before, last = len(os.listdir("/proc/self/fd")), 1
    for _ in range(10):
        pair.client.finalize()
        options = {"llm_datadist.Path": "tcp"}
        assert pair.client.initialize("127.0.0.1", options) == h.SUCCESS
        desc = h.MemDesc(pair.ours.ctypes.data, NBYTES)
        assert pair.client.deregister_mem(last) == h.SUCCESS  # that of the life before
        ret, handle = pair.client.register_mem(desc, h.MemType.MEM_HOST)
        assert (ret, handle > last) == (h.SUCCESS, True)
        assert pair.client.deregister_mem(last) == h.SUCCESS
        assert pair.client.register_mem(desc, h.MemType.MEM_HOST) == (h.SUCCESS, handle)
        last = handle
        assert pair.client.connect(pair.name, LONG_MS) in (h.SUCCESS, h.FAILED)
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 10, 20)
