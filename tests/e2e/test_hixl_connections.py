"""`hixl`: connecting and disconnecting, at once and in the background. Spec H.2."""

from __future__ import annotations

import gc
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import hixl_engine
import pytest
from hixl_engine import LONG_MS, NOBODY, Engine, engine, engines, resources, until, whole

from llm_datadist import LLMRole
from llm_datadist import hixl as h
from llm_datadist.peer.peer import Peer
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hixl_engine import EngineProcess

    from llm_datadist.testing.cluster import Node

READ, WRITE = h.TransferOp.READ, h.TransferOp.WRITE
S = h.AsyncConnectStatus
A = TypeVar("A")
T = TypeVar("T")
server, servers, victim = hixl_engine.server, hixl_engine.servers, hixl_engine.victim


@pytest.fixture
def silent() -> Iterator[str]:
    """Takes calls, and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.shows("engine.connect", "engine.disconnect")
def test_connecting_twice_and_disconnecting_twice_are_told(path: str) -> None:
    with engines(2, path) as (server, client):
        hixl, name = client.hixl, server.name
        assert hixl.disconnect(name) == h.NOT_CONNECTED
        assert hixl.connect(name, LONG_MS) == h.SUCCESS
        assert hixl.connect(name, LONG_MS) == h.ALREADY_CONNECTED
        assert hixl.disconnect(name, LONG_MS) == h.SUCCESS
        assert hixl.disconnect(name, LONG_MS) == h.NOT_CONNECTED
        ours, theirs = client.add(), server.add(seed=1)
        assert client.read(name, ours, theirs) == h.NOT_CONNECTED
        client.connect(name)
        assert client.read(name, ours, theirs) == h.SUCCESS


@pytest.mark.shows("engine.connect")
def test_a_connection_belongs_to_the_end_that_made_it(path: str) -> None:
    with engines(2, path) as (server, client):
        client.connect(server.name)
        assert server.hixl.disconnect(client.name, LONG_MS) == h.NOT_CONNECTED
        assert server.hixl.connect(client.name, LONG_MS) == h.SUCCESS
        assert client.hixl.disconnect(server.name, LONG_MS) == h.SUCCESS
        ours, theirs = client.add(), server.add(seed=1)
        assert server.write(client.name, theirs, ours) == h.SUCCESS
        assert server.hixl.disconnect(client.name, LONG_MS) == h.SUCCESS
        until(lambda: server.write(client.name, theirs, ours) == h.NOT_CONNECTED)


@pytest.mark.shows("engine.connect")
def test_many_threads_that_connect_make_one_connection() -> None:
    with engines(2) as (server, client):
        rets: list[int] = []
        threads = [
            threading.Thread(target=lambda: rets.append(client.hixl.connect(server.name, LONG_MS)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(rets) == [h.SUCCESS] + [h.ALREADY_CONNECTED] * 7
        assert len(client.hixl.links()) == 1


@pytest.mark.shows("engine.connect")
def test_who_cannot_be_connected_to_is_told_in_time(silent: str) -> None:
    with engine() as client:
        with takes_at_most(5):
            assert client.hixl.connect(NOBODY, LONG_MS) == h.FAILED
        with takes_at_most(5):
            assert client.hixl.connect(silent, 300) == h.TIMEOUT
        for name in ("", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:-5", "::1:5", "[::1]", "x:5"):
            assert client.hixl.connect(name) == h.PARAM_INVALID
            assert client.hixl.disconnect(name) == h.PARAM_INVALID
        for timeout in (0, -1, 2**31):
            assert client.hixl.connect(NOBODY, timeout) == h.PARAM_INVALID
            assert client.hixl.disconnect(NOBODY, timeout) == h.PARAM_INVALID


@pytest.mark.shows("engine.names_unique")
def test_a_name_that_somebody_uses_is_not_given_to_another() -> None:
    with engines(1) as (server,):
        first, second = h.Hixl(), h.Hixl()
        for hixl in (first, second):
            assert hixl.initialize("127.0.0.77") == h.SUCCESS
        try:
            assert first.connect(server.name, LONG_MS) == h.SUCCESS
            assert second.connect(server.name, LONG_MS) == h.FAILED
            first.finalize()
            assert second.connect(server.name, LONG_MS) == h.SUCCESS
        finally:
            first.finalize()
            second.finalize()


@pytest.mark.shows("engine.connect")
def test_the_peers_death_ends_the_connection_and_its_heir_is_reached(
    victim: EngineProcess, path: str
) -> None:
    name, theirs = victim.start(), victim.call(Engine.add)
    with engine(path, listens=False) as client:
        ours = client.add(seed=1)
        client.connect(name)
        assert client.write(name, ours, theirs) == h.SUCCESS
        victim.kill()
        until(lambda: client.hixl.links() == [])
        assert client.write(name, ours, theirs) == h.NOT_CONNECTED
        assert client.hixl.disconnect(name, LONG_MS) == h.NOT_CONNECTED
        heir = Engine(path)
        try:
            assert heir.initialize(name, {}) == h.SUCCESS
            theirs = heir.add()
            client.connect(name)
            assert client.write(name, ours, theirs) == h.SUCCESS
            assert heir.bytes_of(theirs) == client.bytes_of(ours)
        finally:
            heir.stop()


@pytest.mark.shows("engine.disconnect")
def test_a_peer_that_stands_still_is_cut_off_when_the_time_is_over(
    server: EngineProcess, path: str
) -> None:
    """A transfer that waits for it fails, and nothing of it comes later."""
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    with engine(path, listens=False) as client:
        ours = client.add(seed=2)
        client.connect(name)
        server.pause()
        req = client.begin(name, WRITE, ours, theirs)
        with takes_at_most(10):
            assert client.hixl.disconnect(name, 300) == h.TIMEOUT
        assert client.hixl.get_transfer_status(req) == (h.SUCCESS, h.TransferStatus.FAILED)
        assert client.hixl.disconnect(name, 300) == h.NOT_CONNECTED
        client.fill(ours, 9)
        server.resume()
        client.connect(name)
        landing = client.add()
        assert client.read(name, landing, theirs) == h.SUCCESS
        assert client.bytes_of(landing) == server.call(Engine.bytes_of, theirs)
        assert server.call(Engine.bytes_of, theirs) != bytes([9]) * 4096


@pytest.mark.shows("engine.connect_async", "engine.get_async_connect_status")
def test_connecting_in_the_background() -> None:
    with engines(3) as (client, first, second):
        hixl = client.hixl
        assert client.async_status(first.name) is S.NOT_CONNECT
        assert hixl.get_all_async_connect_status() == (h.SUCCESS, {})
        for peer in (first, second):
            assert hixl.connect_async(peer.name, LONG_MS) == h.SUCCESS
        assert hixl.connect_async(NOBODY, LONG_MS) == h.SUCCESS
        until(lambda: client.async_status(first.name) is S.CONNECTED)
        until(lambda: client.async_status(second.name) is S.CONNECTED)
        until(lambda: client.async_status(NOBODY) is S.CONNECT_FAILED)
        assert hixl.get_all_async_connect_status() == (
            h.SUCCESS,
            {first.name: S.CONNECTED, second.name: S.CONNECTED, NOBODY: S.CONNECT_FAILED},
        )
        ours, theirs = client.add(), first.add(seed=1)
        assert client.read(first.name, ours, theirs) == h.SUCCESS
        assert hixl.disconnect_async(first.name, LONG_MS) == h.SUCCESS
        until(lambda: client.async_status(first.name) is S.NOT_CONNECT)
        assert client.read(first.name, ours, theirs) == h.NOT_CONNECTED
        second.stop()
        until(lambda: client.async_status(second.name) is S.NOT_CONNECT)


@pytest.mark.shows("engine.connect_async")
def test_tasks_for_one_engine_are_done_in_order() -> None:
    with engines(2) as (client, server):
        for _ in range(5):
            assert client.hixl.connect_async(server.name, LONG_MS) == h.SUCCESS
            assert client.hixl.disconnect_async(server.name, LONG_MS) == h.SUCCESS
        assert client.hixl.connect_async(server.name, LONG_MS) == h.SUCCESS
        until(lambda: client.async_status(server.name) is S.CONNECTED)
        assert len(client.hixl.links()) == 1


@pytest.mark.shows("engine.connect_async")
def test_a_full_queue_is_told_and_holds_up_nobody_else(silent: str) -> None:
    config = resources(connect_pool__thread_num=2, connect_pool__task_queue_capacity=3)
    with engine() as server, engine(GLOBAL_RESOURCE_CONFIG=config) as client:
        hixl = client.hixl
        assert hixl.connect_async(silent, 3000) == h.SUCCESS
        until(lambda: client.async_status(silent) is S.CONNECTING)
        for _ in range(3):
            assert hixl.disconnect_async(silent, LONG_MS) == h.SUCCESS
        assert hixl.connect_async(silent, LONG_MS) == h.RESOURCE_EXHAUSTED
        assert hixl.disconnect_async(server.name, LONG_MS) == h.RESOURCE_EXHAUSTED
        assert client.async_status(server.name) is S.NOT_CONNECT
        assert client.async_status(silent) is S.DISCONNECT_PENDING
        until(lambda: client.async_status(silent) is S.NOT_CONNECT)
        assert hixl.connect_async(server.name, LONG_MS) == h.SUCCESS
        until(lambda: client.async_status(server.name) is S.CONNECTED)


@pytest.mark.shows("engine.connect_async")
def test_others_do_not_wait_for_one_that_is_silent(silent: str) -> None:
    with engine() as server, engine() as client:
        for _ in range(4):
            assert client.hixl.connect_async(silent, 2**31 - 1) == h.SUCCESS
        assert client.hixl.connect_async(server.name, LONG_MS) == h.SUCCESS
        with takes_at_most(10):
            until(lambda: client.async_status(server.name) is S.CONNECTED)
        with takes_at_most(8):
            client.stop()


@pytest.mark.shows("engine.connect_async")
def test_what_cannot_be_is_refused_at_once() -> None:
    with engine() as client:
        for call in (client.hixl.connect_async, client.hixl.disconnect_async):
            for timeout in (0, -1, 2**31):
                assert call(NOBODY, timeout) == h.PARAM_INVALID
            for name in ("", "127.0.0.1", "nonsense:5"):
                assert call(name) == h.PARAM_INVALID
        assert client.hixl.get_async_connect_status("nonsense") == (
            h.PARAM_INVALID, S.NOT_CONNECT,
        )  # fmt: skip
        assert client.hixl.get_all_async_connect_status() == (h.SUCCESS, {})


@pytest.mark.shows("engine.disconnect", "engine.send_notify")
def test_engines_that_are_gone_are_forgotten(path: str) -> None:
    """Not by who read from them, nor by who has not read their notices."""
    before = num_peers()
    with engine(path) as reader, engine(path) as told:
        ours = reader.add()
        for seed in range(12):
            with engine(path) as server:
                reader.connect(server.name)
                assert reader.read(server.name, ours, server.add(seed=seed)) == h.SUCCESS
                server.connect(told.name)
                assert server.send(told.name, h.NotifyDesc("a", "b")) == h.SUCCESS
        until(lambda: reader.hixl.links() == told.hixl.links() == [])
        until(lambda: num_peers() < before + 4)
        assert len(told.hixl.get_notifies()[1]) == 12


def num_peers() -> int:
    gc.collect()
    return sum(type(each) is Peer for each in gc.get_objects())


@pytest.mark.shows("engine.get_async_connect_status")
def test_so_many_engines_that_are_not_connected_are_told_of() -> None:
    config = resources(connect_pool__task_queue_capacity=65535)
    names = [f"127.1.{number // 250}.{number % 250 + 1}:9" for number in range(3000)]
    with engine() as server, engine(GLOBAL_RESOURCE_CONFIG=config) as client:
        hixl = client.hixl
        assert hixl.connect_async(server.name, LONG_MS) == h.SUCCESS
        until(lambda: client.async_status(server.name) is S.CONNECTED)
        for name in names:
            assert hixl.disconnect_async(name, LONG_MS) == h.SUCCESS
            if int(name.split(".")[3].split(":")[0]) == 250:
                until(lambda: client.async_status(name) is S.NOT_CONNECT)  # noqa: B023  # now
        _, statuses = hixl.get_all_async_connect_status()
        assert len(statuses) < 1500
        assert statuses[server.name] is S.CONNECTED


# -- connections that transfers make --


@pytest.mark.shows("engine.auto_connect")
def test_transfers_connect_by_themselves(path: str) -> None:
    with engines(2, path) as (first, second), engine(path, AUTO_CONNECT="1") as client:
        ours, theirs = client.add(), first.add(seed=1)
        assert client.read(first.name, ours, theirs) == h.SUCCESS
        assert client.bytes_of(ours) == first.bytes_of(theirs)
        assert client.hixl.connect(first.name, LONG_MS) == h.ALREADY_CONNECTED
        req = client.begin(second.name, WRITE, ours, second.add())
        assert client.end_of(req) is h.TransferStatus.COMPLETED
        assert client.hixl.disconnect(second.name, LONG_MS) == h.SUCCESS
        notice = h.NotifyDesc("a", "b")
        assert client.hixl.send_notify(second.name, notice, LONG_MS) == h.SUCCESS
        assert client.hixl.transfer_sync(NOBODY, READ, [whole(ours, ours)]) == h.FAILED
        assert client.end_of(client.begin(NOBODY, READ, ours, ours)) is h.TransferStatus.FAILED
        assert client.hixl.transfer_sync("127.0.0.9", READ, []) == h.NOT_CONNECTED


@pytest.mark.shows("engine.auto_connect", "engine.disconnect")
def test_a_request_that_is_connecting_by_itself_is_ended_by_a_disconnect(
    server: EngineProcess, path: str
) -> None:
    name, theirs = server.start(), server.call(Engine.add, seed=1)
    before = server.call(Engine.bytes_of, theirs)
    with engine(path, AUTO_CONNECT="1") as client:
        ours = client.add(seed=2)
        server.pause()
        reqs = [client.begin(name, op, ours, theirs) for op in (READ, WRITE)]
        kept = client.bytes_of(ours)
        assert client.hixl.disconnect(name, LONG_MS) == h.NOT_CONNECTED
        server.resume()
        assert {client.end_of(req) for req in reqs} == {h.TransferStatus.FAILED}
        assert client.bytes_of(ours) == kept
        assert server.call(Engine.bytes_of, theirs) == before


@pytest.mark.shows("engine.auto_connect")
def test_a_link_whose_peer_is_gone_is_made_anew(victim: EngineProcess, path: str) -> None:
    name, theirs = victim.start(), victim.call(Engine.add)
    with engine(path, AUTO_CONNECT="1") as client:
        ours = client.add(seed=1)
        assert client.write(name, ours, theirs) == h.SUCCESS
        victim.kill()
        until(lambda: client.hixl.links() == [])
        assert client.write(name, ours, theirs) == h.FAILED
        heir = Engine(path)
        try:
            assert heir.initialize(name, {}) == h.SUCCESS
            assert client.write(name, ours, heir.add()) == h.SUCCESS
        finally:
            heir.stop()


@pytest.mark.shows("engine.channel_pool")
def test_idle_connections_are_ended_above_the_high_mark(path: str) -> None:
    """Four make room for one: above the mark of 4 they are ended down to 2, the oldest first."""
    config = resources(
        channel_pool__max_channel=8,
        channel_pool__high_waterline=0.5,
        channel_pool__low_waterline=0.25,
    )
    with engines(6, path) as servers, engine(path, GLOBAL_RESOURCE_CONFIG=config) as client:
        ours = client.add()
        theirs = [server.add(seed=index) for index, server in enumerate(servers)]

        def read(index: int) -> list[int]:
            """The engines that are connected then."""
            assert client.read(servers[index].name, ours, theirs[index]) == h.SUCCESS
            assert client.bytes_of(ours) == servers[index].bytes_of(theirs[index])
            ports = {link.endpoint.port for link in client.hixl.links() if link.endpoint}
            names = [server.name for server in servers]
            return sorted(names.index(f"127.0.0.1:{port}") for port in ports)

        assert [read(index) for index in range(4)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
        assert read(0) == [0, 1, 2, 3]
        assert read(4) == [0, 4]
        assert read(1) == [0, 1, 4]
        assert [len(read(index)) <= 4 for index in (0, 1, 2, 3, 4, 5)] == [True] * 6


@pytest.mark.shows("engine.channel_pool")
def test_a_pool_whose_connections_are_all_in_use_is_exhausted(server: EngineProcess) -> None:
    config = resources(channel_pool__max_channel=1)
    name, theirs = server.start(), server.call(Engine.add)
    with engine() as other, engine(GLOBAL_RESOURCE_CONFIG=config) as client:
        ours = client.add()
        client.connect(name)
        assert client.hixl.connect(other.name, LONG_MS) == h.RESOURCE_EXHAUSTED
        assert client.write(name, ours, theirs) == h.SUCCESS
        assert client.hixl.disconnect(name, LONG_MS) == h.SUCCESS
        client.connect(other.name)


@pytest.mark.shows("engine.channel_pool")
def test_a_connection_in_use_is_not_ended(server: EngineProcess) -> None:
    config = resources(
        channel_pool__max_channel=1,
        channel_pool__high_waterline=1,
        channel_pool__low_waterline=0,
    )
    name, theirs = server.start(), server.call(Engine.add)
    with engine() as other, engine(GLOBAL_RESOURCE_CONFIG=config) as client:
        ours = client.add(seed=1)
        assert client.write(name, ours, theirs) == h.SUCCESS
        server.pause()
        req = client.begin(name, WRITE, ours, theirs)
        until(lambda: client.read(other.name, ours, other.add()) == h.RESOURCE_EXHAUSTED)
        server.resume()
        assert client.end_of(req) is h.TransferStatus.COMPLETED
        until(lambda: client.read(other.name, ours, other.add()) == h.SUCCESS)
        assert len(client.hixl.links()) == 1


@pytest.mark.shows("engine.channel_pool")
def test_threads_that_go_to_one_engine_need_one_connection() -> None:
    config = resources(channel_pool__max_channel=1)
    with engine() as server:
        theirs = server.add(seed=1)
        for _ in range(5):
            with engine(AUTO_CONNECT="1", GLOBAL_RESOURCE_CONFIG=config) as client:
                read = partial(client.read, server.name, client.add())
                assert in_threads(4, read, theirs) == [h.SUCCESS] * 4
                assert len(client.hixl.links()) == 1


@pytest.mark.shows("engine.channel_pool")
def test_a_pool_serves_as_many_threads_as_it_has_connections() -> None:
    """None is told that there is no connection, or no room; and there are never more of them."""
    config = resources(
        channel_pool__max_channel=3,
        channel_pool__high_waterline=1.0,
        channel_pool__low_waterline=0.5,
    )
    with engines(5) as servers, engine(GLOBAL_RESOURCE_CONFIG=config) as client:
        ours = client.add()
        theirs = [server.add(seed=index) for index, server in enumerate(servers)]
        counts: set[int] = set()

        def read(thread: int) -> set[int]:
            rng, rets = random.Random(thread), set[int]()
            for _ in range(100):
                index = rng.randrange(len(servers))
                rets.add(client.read(servers[index].name, ours, theirs[index]))
                counts.add(len(client.hixl.links()))
            return rets

        assert in_threads(3, read, *range(3)) == [{h.SUCCESS}] * 3
        assert max(counts) <= 3


def in_threads(count: int, call: Callable[[A], T], *args: A) -> list[T]:
    """What the calls return, all at the same time: one for each argument, or all with the same."""
    with ThreadPoolExecutor(count) as threads:
        barrier = threading.Barrier(count)

        def begin(arg: A) -> T:
            barrier.wait(20)
            return call(arg)

        return list(threads.map(begin, args * (count // len(args))))


# -- a peer of the other kind --


@pytest.mark.shows("engine.send_notify")
def test_a_cluster_of_llm_datadist_takes_no_notices(node: Node) -> None:
    port = node.start(LLMRole.MIX, 5, listen_ip_info="127.0.0.1:0", transfer_backend="hixl")
    name = f"127.0.0.1:{port}"
    with engine() as client:
        client.connect(name)
        notice = h.NotifyDesc("a", "b")
        assert client.hixl.send_notify(name, notice, LONG_MS) == h.UNSUPPORTED
