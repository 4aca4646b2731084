"""Links between hosts, by link_clusters: both IPs, one open port, relays, one-way networks."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import numpy as np
import pytest
import two_hosts
from rank_members import logged, record_log
from two_hosts import CABLE, HOSTS, HOSTS_6, Hosts, ip, let_in

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.links.table import LinkInfo

machines, apart, hosts = two_hosts.machines, two_hosts.apart, two_hosts.hosts

SUCCESS, LINK_FAILED = LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_LINK_FAILED
ALREADY_LINK = LLMStatusCode.LLM_ALREADY_LINK
SHAPE = (4, 32, 32 * 1024)
SRC, DST = [3, 9, 30], [0, 31, 7]
#: the roles of clusters 1 and 2
ROLES = (LLMRole.PROMPT, LLMRole.DECODER)
BOTH_IPS = pytest.mark.parametrize("addresses", [HOSTS, HOSTS_6], ids=["IPv4", "IPv6"])


# -- run by the hosts ------------------------------------------------------------------------------


def start(node: Node, cluster_id: int, host: str, **settings: object) -> int:
    """A cluster that listens there; the port."""
    listen = f"[{host}]:0" if ":" in host else f"{host}:0"
    role = ROLES[cluster_id - 1]
    port = node.start(role, cluster_id, listen_ip_info=listen, **settings)
    node.blocks_cache(*SHAPE, seed=cluster_id, key=BlocksCacheKey(cluster_id, 0))
    return port


def pulls(node: Node, cluster_id: int) -> bool:
    """Whether blocks of a cluster, which its id tells, arrive here."""
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, SRC, DST)
    expected = np.zeros(SHAPE, np.uint8)
    expected[:, DST] = make_array(SHAPE, cluster_id)[:, SRC]
    return np.array_equal(node.arrays[cache.cache_id], expected)


def push(node: Node, cluster_id: int) -> None:
    """Some blocks of this host's first cache, to the other's."""
    cache = next(iter(node.caches.values()))
    node.manager.push_blocks(BlocksCacheKey(cluster_id, 0), cache, SRC, DST)


def has_blocks_of(node: Node, cluster_id: int) -> bool:
    array = next(iter(node.arrays.values()))
    return np.array_equal(array[:, DST], make_array(SHAPE, cluster_id)[:, SRC])


def link_infos(node: Node) -> list[tuple[str, str, Endpoint | None]]:
    return [(link.path, link.path_reason, link.endpoint) for link in node.datadist.links()]


def listen_endpoint(node: Node) -> Endpoint | None:
    return node.datadist.listen_endpoint


def links(node: Node) -> list[LinkInfo]:
    return node.datadist.links()


def answers(node: Node, host: str, port: int) -> bool:
    """Whether anybody on that host can be called at the port, or at least says no."""
    try:
        socket.create_connection((host, port), timeout=0.3).close()
    except TimeoutError:
        return False
    except ConnectionRefusedError:
        return True
    return True


def move_both_ways(hosts: Hosts, *, is_accessible: bool) -> None:
    """Pulls by either end; and a push by cluster 1, where that is possible."""
    one, other = hosts
    assert other.call(pulls, 1)
    assert one.call(pulls, 2)
    if is_accessible:
        one.call(push, 2)
        assert other.call(has_blocks_of, 1)


# -- tests -----------------------------------------------------------------------------------------


@pytest.mark.shows("O34")
@BOTH_IPS
def test_hosts_are_linked_by_tcp_and_say_why(hosts: Hosts, addresses: tuple[str, str]) -> None:
    """Neither has the other's sockets, so they cannot meet to read each other's memory."""
    one, other = hosts
    port = one.call(start, 1, addresses[0])
    other.call(start, 2, addresses[1])
    assert other.call(Node.link, port, 1, host=addresses[0]) == SUCCESS
    ((path, reason, endpoint),) = other.call(link_infos)
    assert (path, endpoint) == ("tcp", (addresses[0], port))
    assert "cma: the peer is in another network namespace" in reason
    ((path, _, endpoint),) = one.call(link_infos)
    assert (path, endpoint) == ("tcp", None)
    move_both_ways(hosts, is_accessible=False)


@BOTH_IPS
def test_one_open_port_of_one_host_is_all_that_is_used(
    hosts: Hosts, addresses: tuple[str, str], is_accessible: bool
) -> None:
    one, other = hosts
    settings = {"enable_remote_cache_accessible": is_accessible}
    port = one.call(start, 1, addresses[0], **settings)
    other.call(start, 2, addresses[1], **settings)
    one_more = port + 1 if port < 65_535 else port - 1
    assert other.call(answers, addresses[0], one_more)
    let_in(one, "dport", port)
    let_in(other, "sport", port)
    assert not other.call(answers, addresses[0], one_more)
    assert other.call(Node.link, port, 1, host=addresses[0]) == SUCCESS
    move_both_ways(hosts, is_accessible=is_accessible)


@BOTH_IPS
def test_the_address_that_is_called_may_be_a_relays(
    hosts: Hosts, addresses: tuple[str, str], is_accessible: bool
) -> None:
    """As with NAT, a proxy or a forwarded port: not even its IP need be of the listener's kind."""
    one, other = hosts
    settings = {"enable_remote_cache_accessible": is_accessible}
    port = one.call(start, 1, addresses[0], **settings)
    let_in(one, "dport", port)
    relayed = other.call(open_relay, addresses[0], port)
    try:
        other.call(start, 2, addresses[1], **settings)
        assert other.call(Node.link, relayed, 1) == SUCCESS
        assert [info[2] for info in other.call(link_infos)] == [("127.0.0.1", relayed)]
        move_both_ways(hosts, is_accessible=is_accessible)
    finally:
        other.call(close_relays)


_relays: list[FaultProxy] = []


def open_relay(node: Node, host: str, port: int) -> int:
    """Relays a port of this host to another one."""
    _relays.append(FaultProxy(port, host))
    return _relays[-1].port


def close_relays(node: Node) -> None:
    while _relays:
        _relays.pop().close()


def test_where_one_end_cannot_call_the_other_it_says_so_and_the_other_end_links(
    hosts: Hosts, is_accessible: bool
) -> None:
    one, other = hosts
    settings = {"enable_remote_cache_accessible": is_accessible}
    ports = [
        process.call(start, cluster_id, host, **settings)
        for cluster_id, (process, host) in enumerate(zip(hosts, HOSTS, strict=True), 1)
    ]
    let_in(one, "dport", ports[0])
    one.call(record_log)
    with takes_at_most(0.7):
        status = one.call(Node.link, ports[1], 2, 500, host=HOSTS[1])
    assert status == LLMStatusCode.LLM_TIMEOUT
    assert_helps(one, f"no connection to {HOSTS[1]}:{ports[1]} within 0.500 s")
    assert other.call(Node.link, ports[0], 1, host=HOSTS[0]) == SUCCESS
    move_both_ways(hosts, is_accessible=is_accessible)


@pytest.mark.parametrize(
    ("route", "says"),
    [
        (["unreachable"], "No route to host"),
        (["prohibit"], "Permission denied"),
        (["local", "dev", "lo"], "Connection refused"),
    ],
    ids=["unreachable", "prohibited", "nobody-listens"],
)
def test_an_address_that_cannot_be_reached_is_refused_at_once(
    hosts: Hosts, route: list[str], says: str
) -> None:
    one = hosts[0]
    one.call(ip, "route", "add", route[0], "192.0.2.0/24", *route[1:])
    one.call(start, 1, HOSTS[0])
    one.call(record_log)
    with takes_at_most(1):
        status = one.call(Node.link, 26_000, 2, 5000, host="192.0.2.1")
    assert status == LLMStatusCode.LLM_LINK_FAILED
    assert_helps(one, f"cannot connect to 192.0.2.1:26000: {says}")


@pytest.mark.shows("link.silent")
def test_an_address_that_leads_nowhere_is_a_timeout_in_time(hosts: Hosts) -> None:
    one = hosts[0]
    one.call(ip, "route", "add", "192.0.2.0/24", "via", HOSTS[1])
    one.call(start, 1, HOSTS[0])
    one.call(record_log)
    with takes_at_most(0.7):
        status = one.call(Node.link, 26_000, 2, 500, host="192.0.2.1")
    assert status == LLMStatusCode.LLM_TIMEOUT
    assert_helps(one, "no connection to 192.0.2.1:26000 within 0.500 s")


def assert_helps(process: NodeProcess, what: str) -> None:
    """The log says what failed, and what to do about it."""
    says = process.call(logged)
    assert what in says
    assert "this end be able to reach it" in says
    assert "let the peer call: one direction is enough" in says


@pytest.mark.parametrize("jumbo", [0, 1], ids=["to-the-caller", "to-the-listener"])
def test_a_network_that_drops_large_frames_is_found_when_the_link_is_made(
    hosts: Hosts, jumbo: int
) -> None:
    """One end sends what fills frames of 9000 bytes, the other's port lets in 1500."""
    small = HOSTS[1 - jumbo]
    hosts[jumbo].call(ip, "link", "set", CABLE, "mtu", "9000", "gso_max_segs", "1")
    says_jumbo = ("proto", "kernel", "scope", "link", "src", small, "advmss", "8960")
    hosts[1 - jumbo].call(ip, "route", "change", f"{HOSTS[0][:-1]}0/30", "dev", CABLE, *says_jumbo)
    port = hosts[0].call(start, 1, HOSTS[0])
    hosts[1].call(start, 2, HOSTS[1])
    hosts[1].call(record_log)
    with takes_at_most(3 + 0.5):
        assert hosts[1].call(Node.link, port, 1, 3000, HOSTS[0]) == LINK_FAILED
    assert "the network drops large frames" in hosts[1].call(logged)
    assert hosts[1].call(link_infos) == []


def test_link_local_addresses_keep_their_zone(hosts: Hosts) -> None:
    zoned = [f"fe80::{digit}%{CABLE}" for digit in (1, 2)]
    for host, address in zip(hosts, zoned, strict=True):
        plain = address.partition("%")[0]
        host.call(ip, "address", "add", f"{plain}/64", "dev", CABLE, "nodad")
    port = hosts[0].call(start, 1, zoned[0])
    hosts[1].call(start, 2, zoned[1])
    assert str(hosts[0].call(listen_endpoint)) == f"[{zoned[0]}]:{port}"
    assert hosts[1].call(Node.link, port, 1, 5000, zoned[0]) == SUCCESS
    assert hosts[1].call(pulls, 1)
    assert hosts[0].call(pulls, 2), "over streams that the caller dials back"
    hosts[1].call(record_log)
    plain = zoned[0].partition("%")[0]
    assert hosts[1].call(Node.link, port, 77, 3000, plain) == LINK_FAILED
    assert "its interface: fe80::1%eth0" in hosts[1].call(logged)


@pytest.mark.parametrize("is_dead", [False, True], ids=["alive", "dead"])
def test_a_link_by_another_address_replaces_the_one_before(hosts: Hosts, is_dead: bool) -> None:
    """As of a host with two networks, of which one may die without a word."""
    port = hosts[0].call(start, 1, "::")
    hosts[1].call(start, 2, HOSTS_6[1])
    assert hosts[1].call(Node.link, port, 1, 5000, HOSTS[0]) == SUCCESS
    assert hosts[1].call(pulls, 1)
    if is_dead:
        hosts[1].call(ip, "address", "del", f"{HOSTS[1]}/30", "dev", CABLE)
    with takes_at_most(4):
        assert hosts[1].call(Node.link, port, 1, 5000, HOSTS_6[0]) == SUCCESS
    assert [link.endpoint for link in hosts[1].call(links)] == [(HOSTS_6[0], port)]
    assert len(hosts[0].call(links)) == 1
    assert hosts[1].call(pulls, 1)
    assert hosts[0].call(pulls, 2)
    assert hosts[1].call(Node.link, port, 1, 5000, HOSTS_6[0]) == ALREADY_LINK
