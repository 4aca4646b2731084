"""The network of this host, for links that begin on it: loopback, the ports of rank tables."""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from llm_datadist.cli.doctor.findings import Case, Finding, State
from llm_datadist.cli.kernel_files import text_of
from llm_datadist.errors import LLMException
from llm_datadist.links.ranks import base_port
from llm_datadist.options import BASE_PORT_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.cli.doctor.findings import Data

_SIOCGIFFLAGS = 0x8913
_IFF_UP = 1
#: of <net/if.h>: a name, and the flags in a union of 24 bytes
_IFREQ = struct.Struct("16sH22x")
_IPV4 = Path("/proc/sys/net/ipv4")
#: hosts have so many devices at most, mostly
_DEVICES = 16


def loopback(_: Case) -> Iterator[Finding]:
    """Whether addresses of this host can be reached from it: its own, too, go by loopback."""
    name = "loopback"
    if is_up("lo"):
        yield Finding(name, State.OK, "up", data={"is_up": True})
        return
    found = "lo is down: nobody reaches 127.0.0.1, or another address of this host, from here"
    yield Finding(name, State.PROBLEM, found, "ip link set lo up", {"is_up": False})


def rank_tables(_: Case) -> Iterator[Finding]:
    """Whether calls of other programs can have the ports of members of rank-table links."""
    name = "rank tables"
    try:
        base = base_port()
    except LLMException as error:
        yield Finding(name, State.PROBLEM, str(error), f"unset {BASE_PORT_VARIABLE}")
        return
    ports = range(base, min(base + _DEVICES, 2**16))
    shown = f"{ports[0]} to {ports[-1]}"
    first, last = given_to_calls()
    given = [port for port in ports if first <= port <= last and port not in reserved()]
    data: Data = {"base_port": base, "first_given": first, "last_given": last}
    if not given:
        yield Finding(name, State.OK, f"{shown}: for devices 0 to {len(ports) - 1}", data=data)
        return
    found = (
        f"{shown} can be taken by calls of any program, which get {first} to {last}: "
        "a member that finds its port taken cannot be called from other hosts"
    )
    remedy = (
        f"sysctl net.ipv4.ip_local_reserved_ports={ports[0]}-{ports[-1]}, or another "
        f"{BASE_PORT_VARIABLE}, the same on all hosts"
    )
    yield Finding(name, State.NOTE, found, remedy, data)


def is_up(interface: str) -> bool:
    """Whether it was set up. Raises OSError."""
    request = _IFREQ.pack(interface.encode(), 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, request)
    return bool(_IFREQ.unpack(answer)[1] & _IFF_UP)


def given_to_calls() -> tuple[int, int]:
    """The first and the last port that the kernel gives to who calls."""
    text = text_of(_IPV4 / "ip_local_port_range") or "32768 60999"
    first, last = map(int, text.split())
    return first, last


def reserved() -> set[int]:
    """The ports that it gives to nobody."""
    text = text_of(_IPV4 / "ip_local_reserved_ports") or ""
    ranges = [part.partition("-") for part in text.split(",") if part]
    return {port for first, _, last in ranges for port in range(int(first), int(last or first) + 1)}
