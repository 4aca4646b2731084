"""Two processes on hosts of their own, which share nothing but a cable.

Each has a PID namespace, so that neither can read the other's memory, and for each test a new
network namespace. They are joined by a pair of virtual interfaces or by a `slow_cable.SlowCable`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import ip_network
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

import pytest

from llm_datadist.testing.cluster import Node, NodeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
#: their addresses
HOSTS = ("198.18.0.1", "198.18.0.2")
HOSTS_6 = ("fd00::1", "fd00::2")
#: the interface that leads to the other one
CABLE = "cable"

Hosts = list[NodeProcess]

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(namespaces: int) -> None:
    """Gives this thread, or what it starts, namespaces of its own. Raises OSError."""
    _check(_libc.unshare(namespaces), "unshare")


def enter_host(pid: int) -> None:
    """Takes this thread to the network of a process. Raises OSError."""
    with open(f"/proc/{pid}/ns/net") as namespace:
        _check(_libc.setns(namespace.fileno(), CLONE_NEWNET), "setns")


def _check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def start_apart() -> NodeProcess:
    """A process that sees no other one, nor is seen by it."""

    def start() -> NodeProcess:
        unshare(CLONE_NEWPID)  # for what this thread starts
        return NodeProcess()

    resource_tracker.ensure_running()  # it would be the first in the new namespace
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(start).result()


def leave_host(node: Node) -> None:
    """Takes this process to a host of its own: it shares no network with any other."""
    unshare(CLONE_NEWNET)


def ip(node: Node, *arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def lay_cable(hosts: Hosts) -> None:
    """Joins two hosts by a pair of virtual interfaces. Raises OSError, CalledProcessError."""
    one, other = hosts
    cable = ["ip", "link", "add", CABLE, "type", "veth", "peer", CABLE, "netns", str(other.pid)]
    there = ["nsenter", f"--net=/proc/{one.pid}/ns/net"]
    subprocess.run([*there, *cable], check=True, capture_output=True, text=True)
    set_up(hosts)


def set_up(hosts: Hosts) -> None:
    """Gives both ends of the cable their addresses."""
    for process, host, host_6 in zip(hosts, HOSTS, HOSTS_6, strict=True):
        process.call(ip, "address", "add", f"{host}/30", "dev", CABLE)
        process.call(ip, "address", "add", f"{host_6}/64", "dev", CABLE, "nodad")
        for device in (CABLE, "lo"):
            process.call(ip, "link", "set", device, "up")


def control_congestion(node: Node, host: str, *algorithm: str) -> None:
    """By which algorithm ("lock" in front: by no other) TCP sends from this host, at that address.

    Raises CalledProcessError.
    """
    route = [str(ip_network(f"{host}/30", strict=False)), "dev", CABLE, "src", host]
    ip(node, "route", "change", *route, "proto", "kernel", "scope", "link", "congctl", *algorithm)


def let_in(process: NodeProcess, side: str, port: int) -> None:
    """A firewall: of the TCP that comes by the cable, only what is to ("dport") or from that port.

    A host that lets in what is to one port can be called there, and cannot call anybody: the
    answers would be to other ports. One that lets in what is from one port is never called.
    """
    for family in ("-4", "-6"):
        rule, tcp = (ip, family, "rule"), ("iif", CABLE, "ipproto", "tcp")
        process.call(*rule, "add", "pref", "1", *tcp, side, str(port), "lookup", "local")
        process.call(*rule, "add", "pref", "2", *tcp, "blackhole")
        process.call(*rule, "add", "pref", "3", "lookup", "local")
        process.call(*rule, "del", "pref", "0")  # which lets in everything


@pytest.fixture(scope="module")
def machines() -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            processes = [stack.enter_context(start_apart()) for _ in HOSTS]
            for process in processes:
                process.call(leave_host)
        except OSError as error:
            pytest.skip(f"hosts of our own need the right to make namespaces (root): {error}")
        yield processes


@pytest.fixture
def apart(machines: Hosts) -> Iterator[Hosts]:
    """Two processes on new hosts of their own, which nothing joins yet."""
    for process in machines:
        process.call(leave_host)
    yield machines
    for process in machines:
        process.call(Node.stop)


@pytest.fixture
def hosts(apart: Hosts) -> Hosts:
    """Two processes on hosts of their own, joined by a cable."""
    try:
        lay_cable(apart)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", "") or error
        pytest.skip(f"a cable between namespaces needs nsenter, iproute2 and veth: {why}")
    return apart
