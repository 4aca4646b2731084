"""`hixl`: asynchronous transfers and notices. Spec H.2."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import hixl_engine
import pytest
from hixl_engine import LONG_MS, NOBODY, Engine, engine, engines, until

from llm_datadist import hixl as h
from llm_datadist.hixl import NotifyDesc, TransferStatus
from llm_datadist.running.movers import _Part
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from hixl_engine import EngineProcess, Range

READ, WRITE = h.TransferOp.READ, h.TransferOp.WRITE
ALL_OF_THEM = 65536
server, servers, victim = hixl_engine.server, hixl_engine.servers, hixl_engine.victim


@pytest.mark.shows("engine.transfer_async", "engine.get_transfer_status")
def test_a_request_is_completed_when_its_bytes_are_there(server: EngineProcess, path: str) -> None:
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add()
        client.connect(name)
        req = client.begin(name, READ, ours, theirs)
        assert client.end_of(req) is TransferStatus.COMPLETED
        assert client.bytes_of(ours) == server.call(Engine.bytes_of, theirs)
        assert client.hixl.get_transfer_status(req) == (h.PARAM_INVALID, TransferStatus.FAILED)
        client.fill(ours, 5)
        req = client.begin(name, WRITE, ours, theirs)
        assert client.end_of(req) is TransferStatus.COMPLETED
        assert server.call(Engine.bytes_of, theirs) == bytes([5]) * 4096
        for unknown in (0, -1, req + 1, 2**70):
            assert client.hixl.get_transfer_status(unknown)[0] == h.PARAM_INVALID


@pytest.mark.shows("engine.get_all_transfer_status")
def test_all_ends_are_told_once_and_with_their_tags(server: EngineProcess, path: str) -> None:
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours, hixl = client.add(), client.hixl
        client.connect(name)
        reqs = [client.begin(name, READ, ours, theirs, tag) for tag in range(20)]
        told: list[h.TransferResult] = []

        def has_all() -> bool:
            ret, results = hixl.get_all_transfer_status(h.GetTransferStatusArgs(7, True))
            assert ret == h.SUCCESS
            assert len(results) <= 7
            told.extend(results)
            return len(told) == 20

        until(has_all)
        expected = [
            h.TransferResult(req, tag, TransferStatus.COMPLETED) for tag, req in enumerate(reqs)
        ]
        assert sorted(told, key=lambda each: each.req) == expected
        assert hixl.get_all_transfer_status() == (h.SUCCESS, [])
        wrong = h.GetTransferStatusArgs(-1)
        assert hixl.get_all_transfer_status(wrong) == (h.PARAM_INVALID, [])


@pytest.mark.shows("engine.get_all_transfer_status")
def test_those_that_wait_are_told_each_time_unless_skipped(server: EngineProcess) -> None:
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(listens=False) as client:
        ours, hixl = client.add(), client.hixl
        client.connect(name)
        assert client.write(name, ours, theirs) == h.SUCCESS
        server.pause()
        reqs = [client.begin(name, WRITE, ours, theirs, tag) for tag in range(10)]
        for _ in range(2):
            ret, results = hixl.get_all_transfer_status()
            assert ret == h.SUCCESS
            assert [(each.req, each.user_data) for each in results] == list(
                zip(reqs, range(10), strict=True)
            )
            assert {each.status for each in results} == {TransferStatus.WAITING}
        skipping = h.GetTransferStatusArgs(skip_waiting=True)
        assert hixl.get_all_transfer_status(skipping) == (h.SUCCESS, [])
        assert len(hixl.get_all_transfer_status(h.GetTransferStatusArgs(3))[1]) == 3
        assert hixl.get_all_transfer_status(h.GetTransferStatusArgs(0)) == (h.SUCCESS, [])
        server.resume()
        assert {client.end_of(req) for req in reqs} == {TransferStatus.COMPLETED}


@pytest.mark.shows("engine.disconnect", "engine.transfer_async")
def test_a_disconnect_ends_what_runs_and_what_waits(server: EngineProcess, path: str) -> None:
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add(seed=2)
        client.connect(name)
        assert client.write(name, ours, theirs) == h.SUCCESS
        server.pause()
        client.fill(ours, 9)
        reqs = [client.begin(name, WRITE, ours, theirs) for _ in range(50)]
        with takes_at_most(10):
            assert client.hixl.disconnect(name, 500) == h.TIMEOUT
        ends = {client.hixl.get_transfer_status(req) for req in reqs}
        assert ends == {(h.SUCCESS, TransferStatus.FAILED)}
        server.resume()
        client.connect(name)
        landing = client.add()
        assert client.read(name, landing, theirs) == h.SUCCESS
        assert server.call(Engine.bytes_of, theirs) != bytes([9]) * 4096


@pytest.mark.shows("engine.transfer_async")
def test_a_peer_that_dies_fails_what_runs(victim: EngineProcess, path: str) -> None:
    name, theirs = victim.start(), victim.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add(seed=2)
        client.connect(name)
        victim.pause()
        reqs = [client.begin(name, WRITE, ours, theirs) for _ in range(20)]
        victim.kill()
        assert {client.end_of(req) for req in reqs} == {TransferStatus.FAILED}


@pytest.mark.shows("engine.transfer_async")
def test_a_peer_that_stands_still_holds_up_no_other(server: EngineProcess) -> None:
    name, theirs = server.start(), server.call(Engine.add)
    with engine() as other, engine(listens=False) as client:
        ours, others = client.add(seed=1), other.add()
        client.connect(name)
        client.connect(other.name)
        server.pause()
        stuck = [client.begin(name, WRITE, ours, theirs) for _ in range(200)]
        with takes_at_most(10):
            req = client.begin(other.name, WRITE, ours, others)
            assert client.end_of(req) is TransferStatus.COMPLETED
        server.resume()
        assert {client.end_of(req) for req in stuck} == {TransferStatus.COMPLETED}


@pytest.mark.shows("engine.transfer_async")
@pytest.mark.parametrize("path", ["tcp"])
def test_what_peers_that_stand_still_keep_is_no_others(server: EngineProcess) -> None:
    """All helpers wait for one; who reads from another does without them, and leaves nothing."""
    name, nbytes = server.start(), 4 << 20
    theirs = server.call(Engine.add, nbytes)
    with engine("tcp") as other, engine("tcp", listens=False) as client:
        ours, others = client.add(nbytes), other.add(nbytes, seed=1)
        client.connect(name)
        client.connect(other.name)
        assert client.read(name, ours, theirs) == h.SUCCESS
        server.pause()
        stuck = client.begin(name, READ, ours, theirs)
        until(lambda: any(link.num_running for link in client.hixl.stats().links))
        landing = client.add(nbytes)
        for _ in range(200):
            assert client.read(other.name, landing, others) == h.SUCCESS
        assert client.bytes_of(landing) == other.bytes_of(others)
        gc.collect()
        assert sum(type(each) is _Part for each in gc.get_objects()) < 100
        server.resume()
        assert client.end_of(stuck) is TransferStatus.COMPLETED


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.shows("engine.transfer_async")
def test_requests_that_nobody_asks_for_are_bounded() -> None:
    with engines(1) as (one,):
        one.connect(one.name)
        hixl, name = one.hixl, one.name
        rets = {hixl.transfer_async(name, READ, [])[0] for _ in range(ALL_OF_THEM)}
        assert rets == {h.SUCCESS}
        assert hixl.transfer_async(name, READ, []) == (h.RESOURCE_EXHAUSTED, 0)
        left = ALL_OF_THEM

        def has_all() -> bool:
            nonlocal left
            _, results = hixl.get_all_transfer_status(h.GetTransferStatusArgs(skip_waiting=True))
            left -= len(results)
            assert {each.status for each in results} <= {TransferStatus.COMPLETED}
            return not left

        until(has_all)
        assert hixl.transfer_async(name, READ, [])[0] == h.SUCCESS


@pytest.mark.shows("engine.deregister_mem")
def test_deregistering_waits_for_what_runs(server: EngineProcess, path: str) -> None:
    name, theirs = server.start(), server.call(Engine.add)
    with engine(path, listens=False) as client:
        ours = client.add(seed=1)
        client.connect(name)
        assert client.write(name, ours, theirs) == h.SUCCESS
        server.pause()
        req = client.begin(name, WRITE, ours, theirs)
        until(lambda: client.hixl.stats().links[0].num_running == 1)
        rets: list[int] = []
        thread = threading.Thread(target=lambda: rets.append(client.deregister(ours)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        server.resume()
        thread.join(30)
        assert rets == [h.SUCCESS]
        # over TCP the receiver asks for the bytes just then, and is refused
        end = TransferStatus.COMPLETED if path == "cma" else TransferStatus.FAILED
        assert client.end_of(req) is end


# -- notices --


@pytest.mark.shows("engine.send_notify", "engine.get_notifies")
def test_notices_come_in_order_and_are_told_once(server: EngineProcess, path: str) -> None:
    name = server.start()
    with engine(path, listens=False) as client:
        client.connect(name)
        notices = [NotifyDesc(f"n{index}", "ä" * index) for index in (0, 1, 1024)]
        for notice in notices:
            assert client.hixl.send_notify(name, notice, LONG_MS) == h.SUCCESS
        assert server.call(notices_of) == notices
        assert server.call(notices_of) == []
        assert server.call(Engine.send, client.name, NotifyDesc("back", "")) == h.SUCCESS
        assert client.hixl.get_notifies() == (h.SUCCESS, [NotifyDesc("back", "")])


def notices_of(engine: Engine) -> list[NotifyDesc]:
    ret, notices = engine.hixl.get_notifies()
    assert ret == h.SUCCESS
    return notices


@pytest.mark.shows("engine.send_notify")
def test_what_cannot_be_sent_is_refused() -> None:
    with engines(1) as (one,):
        one.connect(one.name)
        for notice in (
            NotifyDesc("n" * 1025, ""), NotifyDesc("", "m" * 1025), NotifyDesc("\ud800", ""),
        ):  # fmt: skip
            assert one.hixl.send_notify(one.name, notice) == h.PARAM_INVALID
        for timeout in (0, -1):
            ret = one.hixl.send_notify(one.name, NotifyDesc("", ""), timeout)
            assert ret == h.PARAM_INVALID
        assert one.hixl.send_notify(NOBODY, NotifyDesc("", "")) == h.NOT_CONNECTED
        with pytest.raises(TypeError):
            one.hixl.send_notify(one.name, ("a", "b"))  # type: ignore[arg-type]
        assert notices_of(one) == []


@pytest.mark.shows("engine.get_notifies")
def test_notices_outlast_their_connection() -> None:
    with engines(2) as (one, other):
        other.connect(one.name)
        assert other.hixl.send_notify(one.name, NotifyDesc("a", "b"), LONG_MS) == h.SUCCESS
        other.stop()
        until(lambda: one.hixl.links() == [])
        assert notices_of(one) == [NotifyDesc("a", "b")]


@pytest.mark.shows("engine.register_mem", "engine.deregister_mem")
def test_memory_that_is_registered_while_it_is_deregistered_stays(
    server: EngineProcess, path: str
) -> None:
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add(seed=2)
        client.connect(name)
        assert client.write(name, ours, theirs) == h.SUCCESS
        server.pause()
        req = client.begin(name, WRITE, ours, theirs)
        until(lambda: client.hixl.stats().links[0].num_running == 1)
        with ThreadPoolExecutor() as pool:
            leaving, first = pool.submit(client.deregister, ours), client.handle_of(ours)
            with pytest.raises(TimeoutError):
                leaving.result(0.3)
            desc = h.MemDesc(ours.addr, ours.nbytes)
            ret, again = client.hixl.register_mem(desc, h.MemType.MEM_HOST)
            server.resume()
            assert leaving.result(30) == h.SUCCESS
        client.end_of(req)
        assert ret == h.SUCCESS
        assert again != first
        assert client.hixl.register_mem(desc, h.MemType.MEM_HOST) == (h.SUCCESS, again)
        client.fill(ours, 0)
        assert client.read(name, ours, theirs) == h.SUCCESS
        assert client.bytes_of(ours) == server.call(Engine.bytes_of, theirs)
        assert server.call(read_back, client.name, theirs.nbytes, ours) == h.SUCCESS


def read_back(server: Engine, name: str, nbytes: int, theirs: Range) -> int:
    """Over the connection that the other end has made."""
    return server.read(name, server.add(nbytes), theirs)


@pytest.mark.shows("engine.send_notify")
def test_a_link_has_4096_unread_notices_at_most() -> None:
    with engines(3) as (one, chatty, other):
        for each in (chatty, other):
            each.connect(one.name)
        notice = NotifyDesc("n" * 1024, "m" * 1024)
        sent = [chatty.hixl.send_notify(one.name, notice, LONG_MS) for _ in range(4096)]
        assert set(sent) == {h.SUCCESS}
        assert chatty.hixl.send_notify(one.name, notice, LONG_MS) == h.FAILED
        assert other.hixl.send_notify(one.name, NotifyDesc("me", ""), LONG_MS) == h.SUCCESS
        assert notices_of(one) == [notice] * 4096 + [NotifyDesc("me", "")]
        assert chatty.hixl.send_notify(one.name, notice, LONG_MS) == h.SUCCESS


@pytest.mark.shows("engine.send_notify")
def test_a_notice_to_a_peer_that_stands_still_times_out(server: EngineProcess) -> None:
    name = server.start()
    with engine(listens=False) as client:
        client.connect(name)
        server.pause()
        with takes_at_most(5):
            assert client.hixl.send_notify(name, NotifyDesc("a", "b"), 300) == h.TIMEOUT
        server.resume()
        assert client.hixl.send_notify(name, NotifyDesc("c", "d"), LONG_MS) == h.SUCCESS
