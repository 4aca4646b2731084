"""Two processes on hosts of their own: network namespaces that share nothing but a cable."""

from __future__ import annotations

import ctypes
import subprocess
from typing import TYPE_CHECKING

import pytest

from llm_datadist.testing.cluster import Node, NodeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_NEWNET = 0x40000000
#: their addresses
HOSTS = ("198.18.0.1", "198.18.0.2")
HOSTS_6 = ("fd00::1", "fd00::2")


def leave_host(node: Node) -> None:
    """Takes this process to a host of its own: it shares no network with any other."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


def ip(node: Node, *arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def hosts() -> Iterator[list[NodeProcess]]:
    """Two processes on hosts of their own, joined by a cable."""
    with NodeProcess() as one, NodeProcess() as other:
        try:
            for process in (one, other):
                process.call(leave_host)
            there = str(other.pid)
            one.call(ip, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", there)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces need privileges and iproute2: {error}")
        for process, host, host_6 in zip((one, other), HOSTS, HOSTS_6, strict=True):
            process.call(ip, "address", "add", f"{host}/30", "dev", "cable")
            process.call(ip, "address", "add", f"{host_6}/64", "dev", "cable", "nodad")
            for device in ("cable", "lo"):
                process.call(ip, "link", "set", device, "up")
        yield [one, other]
