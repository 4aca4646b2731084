"""Which entry of a rank table is a member's own, and where the others call it. Spec 12.3."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import rank_members
import two_hosts
from rank_members import (
    OK,
    SOON_S,
    Members,
    call_all,
    link,
    pulls,
    record_log,
    settle,
    start,
    unlink,
)
from two_hosts import HOSTS, enter_host

from llm_datadist.testing.cluster import Node, NodeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

job = rank_members.job
machines, apart, hosts = two_hosts.machines, two_hosts.apart, two_hosts.hosts

#: where ports begin
BASE = 61_000
#: of the visible devices, as an engine finds them in its machine's table
DEVICES = (4, 6, 5)
#: a crossing of calls is rare
NUM_TIMES = 40


@pytest.fixture
def second_engine(hosts: Members) -> Iterator[NodeProcess]:
    """Another process on the first host."""
    with NodeProcess() as process:
        process.call(join_host, hosts[0].pid)
        yield process


def join_host(node: Node, pid: int) -> None:
    enter_host(pid)


def entry(rank: int, host: str, device_id: int | None = None, **more: object) -> dict[str, object]:
    device: dict[str, object] = {"device_ip": f"192.168.58.{60 + rank}", "rank_id": str(rank)}
    if device_id is not None:
        device["device_id"] = str(device_id)
    return {"server_id": host, "device": [{**device, **more}]}


def table_of(*entries: dict[str, object]) -> str:
    return json.dumps({"version": "1.2", "status": "completed", "server_list": entries})


def without_ranks(table: str) -> str:
    data = json.loads(table)
    for server in data["server_list"]:
        for device in server["device"]:
            del device["rank_id"]
    return json.dumps(data)


def start_with_local_ranks(members: Members, device_ids: tuple[int, ...]) -> None:
    for index, (member, device_id) in enumerate(zip(members, device_ids, strict=True)):
        member.call(start, index + 1, device_id=device_id)


@pytest.mark.shows("relies.3")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("has_ranks", [True, False], ids=["ranks", "no-ranks"])
@pytest.mark.parametrize(
    "devices", [DEVICES[:2], (None, None)], ids=["device-ids", "no-device-ids"]
)
def test_a_member_is_called_at_the_port_of_its_own_entry_whatever_its_device_id(
    hosts: Members, devices: tuple[int | None, ...], has_ranks: bool, order: tuple[int, int]
) -> None:
    table = table_of(*map(entry, (0, 1), HOSTS, devices))
    start_with_local_ranks(hosts, (0, 3))
    for index in order:
        assert (
            hosts[index].call(link, "kv", (1, 2), table if has_ranks else without_ranks(table)) == 1
        )
    assert call_all(hosts, settle, 1) == [OK, OK]
    assert hosts[0].call(pulls, 2)
    assert hosts[1].call(pulls, 1)
    (called,) = [at for found in call_all(hosts, endpoints) for at in found if at]
    places = [(host, BASE + (device or 0)) for host, device in zip(HOSTS, devices, strict=True)]
    assert called in places  # the early one's; or it was just trying, too


def endpoints(node: Node) -> list[tuple[str, int] | None]:
    return [link.endpoint for link in node.datadist.links()]


@pytest.mark.shows("relies.3")
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("has_ranks", [True, False], ids=["ranks", "no-ranks"])
def test_two_engines_of_a_host_with_the_same_local_rank_and_one_elsewhere(
    hosts: Members, second_engine: NodeProcess, has_ranks: bool, order: tuple[int, ...]
) -> None:
    members = [*hosts, second_engine]
    table = table_of(*map(entry, range(3), (*HOSTS, HOSTS[0]), DEVICES))
    start_with_local_ranks(members, (0, 0, 0))
    for index in order:
        members[index].call(link, "kv", (1, 2, 3), table if has_ranks else without_ranks(table))
    assert call_all(members, settle, 1) == [OK] * 3
    for cluster_id, member in enumerate(members, 1):
        assert all(member.call(pulls, other) for other in (1, 2, 3) if other != cluster_id)


@pytest.mark.shows("relies.3")
def test_members_that_look_for_each_other_at_the_same_places_link_when_all_call_at_once(
    hosts: Members, second_engine: NodeProcess
) -> None:
    """Without ranks a member is called at all places, and answers at that of another."""
    members = [*hosts, second_engine]
    table = without_ranks(table_of(*map(entry, range(3), (*HOSTS, HOSTS[0]), DEVICES)))
    start_with_local_ranks(members, (0, 0, 0))
    for attempt in range(NUM_TIMES):
        ids = call_all(members, link, f"kv{attempt}", (1, 2, 3), table)
        for member, comm_id in zip(members, ids, strict=True):
            assert member.call(settle, comm_id) is OK, attempt
        for member, comm_id in zip(members, ids, strict=True):
            member.call(unlink, comm_id)


@pytest.mark.shows("relies.3")
def test_a_place_where_nobody_says_anything_holds_nobody_up(
    hosts: Members, second_engine: NodeProcess
) -> None:
    """Without ranks it may be anybody's: a stopped engine, or another program."""
    members, silent = [*hosts, second_engine], 9
    places = (HOSTS[0], *HOSTS, HOSTS[0]), (silent, *DEVICES)
    table = without_ranks(table_of(*map(entry, range(4), *places)))
    start_with_local_ranks(members, (0, 0, 0))
    hosts[0].call(take_port, HOSTS[0], BASE + silent)
    try:
        ids = call_all(members, link, "kv", (1, 2, 3), table)
        for member, comm_id in zip(members, ids, strict=True):
            assert member.call(settle, comm_id, SOON_S) is OK
    finally:
        hosts[0].call(free_port)


def take_port(node: Node, host: str, port: int) -> None:
    node.taken = socket.create_server((host, port))  # type: ignore[attr-defined]  # of this test's


def free_port(node: Node) -> None:
    node.taken.close()  # type: ignore[attr-defined]  # of this test's


@pytest.mark.shows("relies.3")
def test_a_member_whose_port_is_taken_calls_those_who_come_later(hosts: Members) -> None:
    table = table_of(*map(entry, (0, 1), HOSTS, DEVICES[:2]))
    start_with_local_ranks(hosts, (0, 0))
    hosts[0].call(record_log)
    hosts[0].call(take_port, HOSTS[0], BASE + DEVICES[0])
    try:
        for member in hosts:
            member.call(link, "kv", (1, 2), table)
        assert call_all(hosts, settle, 1) == [OK, OK]
    finally:
        hosts[0].call(free_port)
    assert hosts[1].call(pulls, 1)


# -- addresses of one's own host -------------------------------------------------------------------


class Published:
    """A port of the first host that leads to one of the second, as of a container's."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server = socket.create_server((HOSTS[0], port))
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._server.accept()
                try:
                    listener = socket.create_connection((HOSTS[1], self._port), timeout=5)
                except OSError:
                    caller.close()
                    continue
                for ends in ((caller, listener), (listener, caller)):
                    threading.Thread(target=_pass_on, args=ends, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def publish_port(node: Node, port: int) -> None:
    node.published = Published(port)  # type: ignore[attr-defined]  # of this test's


def end_publishing(node: Node) -> None:
    node.published.close()  # type: ignore[attr-defined]  # of this test's


@pytest.mark.shows("relies.3")
@pytest.mark.parametrize("last", [0, 1], ids=["host-last", "container-last"])
def test_a_member_in_a_container_is_called_at_the_hosts_own_address(
    hosts: Members, last: int
) -> None:
    """The table knows both by the host's address; the second has a network of its own."""
    table = table_of(*map(entry, (0, 1), (HOSTS[0], HOSTS[0]), DEVICES[:2]))
    start_with_local_ranks(hosts, (0, 1))
    hosts[0].call(publish_port, BASE + DEVICES[1])
    try:
        for index in (1 - last, last):
            hosts[index].call(link, "kv", (1, 2), table)
        assert call_all(hosts, settle, 1) == [OK, OK]
        assert hosts[0].call(pulls, 2)
        assert hosts[1].call(pulls, 1)
    finally:
        hosts[0].call(end_publishing)


# -- what is open to whom --------------------------------------------------------------------------


def can_connect(node: Node, host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.shows("relies.3")
def test_a_member_listens_at_its_address_of_the_table_alone(hosts: Members) -> None:
    start_with_local_ranks(hosts, (0, 0))
    table = table_of(*map(entry, (0, 1), HOSTS, DEVICES[:2]))
    hosts[0].call(link, "kv", (1, 2), table)
    port = BASE + DEVICES[0]
    assert hosts[1].call(can_connect, HOSTS[0], port)
    assert not hosts[0].call(can_connect, "127.0.0.1", port)
    assert not hosts[1].call(can_connect, HOSTS[0], BASE)


# -- without loopback ------------------------------------------------------------------------------


def set_down(node: Node, interface: str) -> None:
    two_hosts.ip(node, "link", "set", interface, "down")


@pytest.mark.shows("relies.3")
def test_members_on_two_hosts_meet_while_lo_is_down(hosts: Members) -> None:
    for host in hosts:
        host.call(set_down, "lo")
    start_with_local_ranks(hosts, (0, 0))
    for host in hosts:
        host.call(link, "kv", (1, 2), table_of(*map(entry, (0, 1), HOSTS, DEVICES[:2])))
    assert call_all(hosts, settle, 1) == [OK, OK]
    assert hosts[1].call(pulls, 1)
