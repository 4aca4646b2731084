"""The rendezvous of rank-table links: on one host by name, on others by address. Spec 12.3."""

from __future__ import annotations

import json
import logging
import os
import socket
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import rank_members
import two_hosts
from rank_members import (
    FAILED,
    INVALID,
    LINK_FAILED,
    NOT_LINKED,
    OK,
    PREPARING,
    Members,
    call_all,
    has_called,
    link,
    link_pair,
    logged,
    pulls,
    query,
    record_log,
    refusal,
    seconds_to_settle,
    settle,
    start,
    start_all,
    status_of_link,
    unlink,
)
from two_hosts import HOSTS, HOSTS_6, let_in

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

job = rank_members.job
machines, apart, hosts = two_hosts.machines, two_hosts.apart, two_hosts.hosts
processes = rank_members.processes
members = rank_members.members

BASE_PORT = "LLM_DATADIST_LINK_BASE_PORT"
#: where its ports begin unless it says otherwise
BASE = 61_000
#: nobody has these addresses, which are for documents
NOWHERE = ("192.0.2.7", "192.0.2.8")
#: the devices of the members on the two hosts
DEVICES = (0, 3)


# -- on other hosts --------------------------------------------------------------------------------


def set_base_port(node: Node, port: int | None) -> None:
    os.environ.pop(BASE_PORT, None)
    if port is not None:
        os.environ[BASE_PORT] = str(port)


def endpoints(node: Node) -> list[tuple[str, int] | None]:
    return [link.endpoint for link in node.datadist.links()]


def servers_with(field: str, hosts: tuple[str, str] = HOSTS) -> list[dict[str, object]]:
    """Entries of which that field alone leads to the host."""
    servers = []
    for rank, (host, device_id) in enumerate(zip(hosts, DEVICES, strict=True)):
        device = {"rank_id": str(rank), "device_id": str(device_id)}
        server: dict[str, object] = {"server_id": str(rank + 1), "device": [device]}
        if field == "device_ip":
            device["device_ip"] = host
        elif field == "host_ip":  # goes before all others
            device["device_ip"] = NOWHERE[0]
            server.update(server_id=NOWHERE[1], host_ip=host)
        else:
            device["device_ip"] = NOWHERE[0]
            server["server_id"] = host
        servers.append(server)
    return servers


@pytest.mark.shows("relies.3", "relies.1")
@pytest.mark.parametrize("field", ["host_ip", "server_id", "device_ip"])
@pytest.mark.parametrize("base_port", [None, 41_000])
def test_members_on_two_hosts_are_linked_by_the_addresses_of_the_table(
    hosts: Members, field: str, base_port: int | None
) -> None:
    early, late = hosts
    for cluster_id, (process, device_id) in enumerate(zip(hosts, DEVICES, strict=True), 1):
        process.call(set_base_port, base_port)
        process.call(start, cluster_id, device_id=device_id, transfer_path="tcp")
    table = json.dumps({"server_list": servers_with(field)})
    assert early.call(link, "kv", (1, 2), table) == 1
    assert early.call(settle, 1, 0.5) is PREPARING
    assert late.call(link, "kv", (1, 2), table) == 1
    assert call_all(hosts, settle, 1) == [OK, OK]
    port = base_port or BASE
    by_the_late = [[None], [(HOSTS[0], port + DEVICES[0])]]
    by_the_early = [[(HOSTS[1], port + DEVICES[1])], [None]]  # it tries until the other one listens
    assert call_all(hosts, endpoints) in (by_the_late, by_the_early)
    assert early.call(pulls, 2)
    assert late.call(pulls, 1)


@pytest.mark.shows("relies.3", "O34")
def test_members_on_two_hosts_are_linked_by_ipv4_and_by_ipv6_at_the_same_port(
    hosts: Members,
) -> None:
    for cluster_id, (process, device_id) in enumerate(zip(hosts, DEVICES, strict=True), 1):
        process.call(set_base_port, None)
        process.call(start, cluster_id, device_id=device_id)
    for name, addresses in (("kv4", HOSTS), ("kv6", HOSTS_6)):
        table = json.dumps({"server_list": servers_with("host_ip", addresses)})
        comm_ids = [process.call(link, name, (1, 2), table) for process in hosts]
        settled = zip(hosts, comm_ids, strict=True)
        assert [process.call(settle, comm_id) for process, comm_id in settled] == [OK, OK]
        called = [endpoint for found in call_all(hosts, endpoints) for endpoint in found]
        expected = [(addresses[0], BASE + DEVICES[0]), (addresses[1], BASE + DEVICES[1])]
        assert sorted(endpoint in expected for endpoint in called) == [False, True]
        assert hosts[0].call(pulls, 2)
        assert hosts[1].call(pulls, 1)
        for process, comm_id in zip(hosts, comm_ids, strict=True):
            process.call(unlink, comm_id)


@pytest.mark.shows("relies.3")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["callable-first", "callable-last"])
@pytest.mark.parametrize("only_callable", [0, 1])
def test_members_of_whom_only_one_can_call_the_other(
    hosts: Members, only_callable: int, order: tuple[int, int]
) -> None:
    """The one that calls `link` last must be able to, or they try more than once."""
    for cluster_id, (process, device_id) in enumerate(zip(hosts, DEVICES, strict=True), 1):
        process.call(set_base_port, None)
        process.call(start, cluster_id, device_id=device_id, link_total_time=1, link_retry_count=2)
    let_in(hosts[only_callable], "dport", BASE + DEVICES[only_callable])
    table = json.dumps({"server_list": servers_with("host_ip")})
    for member in order:
        assert hosts[member ^ only_callable].call(link, "kv", (1, 2), table) == 1
    assert call_all(hosts, settle, 1) == [OK, OK]
    assert hosts[0].call(pulls, 2)
    assert hosts[1].call(pulls, 1)


@pytest.mark.shows("relies.3")
def test_the_log_says_that_a_member_could_not_be_reached_and_what_to_do(hosts: Members) -> None:
    only_callable, caller = hosts
    for cluster_id, (process, device_id) in enumerate(zip(hosts, DEVICES, strict=True), 1):
        process.call(set_base_port, None)
        process.call(start, cluster_id, device_id=device_id, link_total_time=1)
        process.call(record_log, logging.INFO)
    let_in(only_callable, "dport", BASE + DEVICES[0])
    table = json.dumps({"server_list": servers_with("host_ip")})
    assert caller.call(link, "kv", (1, 2), table) == 1
    assert caller.call(has_called, 1)
    assert only_callable.call(link, "kv", (1, 2), table) == 1
    assert call_all(hosts, settle, 1) == [FAILED, FAILED]
    says = only_callable.call(logged)
    assert f"no connection to {HOSTS[1]}:{BASE + DEVICES[1]} within" in says
    assert "the one that calls `link` last must be able to reach the other" in says


@pytest.mark.shows("relies.3")
def test_members_on_two_hosts_are_not_found_by_name(hosts: Members) -> None:
    """Though all else is shared: the name is one of a network namespace's."""
    for cluster_id, process in enumerate(hosts, 1):
        process.call(start, cluster_id, link_total_time=1)
        process.call(record_log)
    assert call_all(hosts, link) == [1, 1]
    assert call_all(hosts, settle, 1) == [FAILED, FAILED]
    missing = "no host_ip, no server_id that is an IP address and no device_ip"
    assert missing in hosts[0].call(logged)


@pytest.mark.shows("relies.3")
def test_a_member_listens_for_other_hosts_at_base_port_and_device(members: Members) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    member = members[0]
    member.call(set_base_port, port - 3)
    try:
        member.call(start, 1, device_id=3)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        servers = [{"host_ip": NOWHERE[0], "device": [{"rank_id": 1, "device_id": 0}]}]
        member.call(link, "kv", (1, 2), json.dumps({"server_list": servers}))
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    finally:
        member.call(set_base_port, None)


@pytest.mark.shows("relies.3")
@pytest.mark.parametrize("text", ["0", "65536", "-1", "sixty"])
def test_a_base_port_that_is_none_is_refused(members: Members, text: str) -> None:
    member = members[0]
    member.call(start, 1)
    member.call(os_environ_set, text)
    try:
        assert refusal(member, link) is INVALID
    finally:
        member.call(set_base_port, None)


def os_environ_set(node: Node, text: str) -> None:
    os.environ[BASE_PORT] = text


# -- who is not found ------------------------------------------------------------------------------


@pytest.mark.shows("datadist.query_register_mem_status", "relies.3")
def test_an_absent_member_fails_the_link_in_time_and_the_log_says_who(members: Members) -> None:
    member = members[0]
    member.call(start, 1, link_total_time=1)
    member.call(record_log)
    servers = [{"server_id": "x", "device": [{"rank_id": 0}]}]
    comm_id = member.call(link, "kv", (1, 77), json.dumps({"server_list": servers}))
    status, seconds = member.call(seconds_to_settle, comm_id)
    assert status is FAILED
    assert 0.5 < seconds < 3
    says = member.call(logged)
    assert "cluster 77" in says
    assert "this host" in says
    assert [member.call(query, comm_id) for _ in range(2)] == [FAILED, FAILED]
    member.call(unlink, comm_id)
    assert refusal(member, query, comm_id) is NOT_LINKED


def test_the_log_says_at_which_address_a_member_was_looked_for(members: Members) -> None:
    member = members[0]
    member.call(start, 1, link_total_time=1)
    member.call(record_log)
    servers = [{"host_ip": "192.0.2.7", "device": [{"rank_id": "1", "device_id": "3"}]}]
    comm_id = member.call(link, "kv", (1, 77), json.dumps({"server_list": servers}))
    status, seconds = member.call(seconds_to_settle, comm_id)
    assert (status, seconds < 3) == (FAILED, True)
    assert f"192.0.2.7:{BASE + 3}" in member.call(logged)


@pytest.mark.parametrize("device_id", ["9999", "-61001", "100000000000"])
def test_a_device_id_that_gives_no_port_fails_the_link_in_time(
    members: Members, device_id: str
) -> None:
    member = members[0]
    member.call(start, 1, link_total_time=1)
    servers = [{"host_ip": "192.0.2.7", "device": [{"rank_id": 1, "device_id": device_id}]}]
    table = json.dumps({"server_list": servers})
    status = member.call(status_of_link, table)
    assert status in (LINK_FAILED, INVALID, FAILED)


def test_an_own_device_id_that_gives_no_port_still_links_on_this_host(members: Members) -> None:
    pair = members[:2]
    start_all(pair, device_id=9999)
    servers = [
        {"host_ip": "127.0.0.1", "device": [{"rank_id": 0, "device_id": 9999}]},
        {"host_ip": "192.0.2.7", "device": [{"rank_id": 1, "device_id": 1}]},
    ]
    link_pair(pair, "kv", (1, 2), json.dumps({"server_list": servers}))
