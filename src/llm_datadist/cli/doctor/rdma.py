"""RDMA: the devices that the kernel knows, and what UCX, which NIXL is built on, makes of them."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from llm_datadist.cli.doctor.findings import Case, Finding, State
from llm_datadist.cli.kernel_files import text_of
from llm_datadist.transport import ucx
from llm_datadist.transport.nixl_agent import package

if TYPE_CHECKING:
    from collections.abc import Iterator

_VERBS = Path("/dev/infiniband")
#: what says which devices and transports UCX may use
_CHOICES = ("UCX_TLS", "UCX_NET_DEVICES")
#: where distributions keep the drivers of their libibverbs
_DRIVERS = ("/usr/lib/*-linux-gnu/libibverbs", "/usr/lib64/libibverbs", "/usr/lib/libibverbs")
_UNLOADED = "couldn't load driver"
_NAME = "UCX"
#: whoever asks the doctor wants to know, however slow the machine is
_PATIENCE_S = 120.0


def devices(_: Case) -> Iterator[Finding]:
    """The RDMA devices that the kernel knows: state, and by which addresses they are reached."""
    ports = _ports()
    if not ports:
        yield Finding("RDMA", State.UNAVAILABLE, "no device: links to other hosts use tcp")
        return
    found = "; ".join(f"{_name(port)} {_state(port)}, {_gids_of(port)}" for port in ports)
    data = {"devices": len({port.parent.parent for port in ports})}
    active = [port for port in ports if _state(port) == "active"]
    remedy = ""
    if not active:
        remedy = "no port is up: ip link set INTERFACE up; a cable, a switch, a subnet manager?"
    elif not any(map(_ip_gids, active)):
        remedy = "no port has the GID of an IP address: give its interface one"
    found += ": only NIXL makes use of it"
    yield Finding("RDMA", State.NOTE, found, remedy, data)


def ucx_ways(_: Case) -> Iterator[Finding]:
    """What UCX would move bytes by, and why not by RDMA where there is a device."""
    name = package()
    if name is None:
        yield Finding(_NAME, State.UNAVAILABLE, "not installed: it comes with NIXL")
        return
    said = ucx.ask(name, timeout_s=_PATIENCE_S)
    ways = ", ".join(map(str, said.rdma or said.ways)) or "nothing"
    data = {"rdma": ", ".join(map(str, said.rdma)), "ways": ", ".join(map(str, said.ways))}
    if not ucx.has_active_port():
        state = State.NOTE if said.failure else State.OK
        found = said.failure or f"no RDMA port is up; it would use {ways}"
        yield Finding(_NAME, state, found, data=data)
    elif said.rdma and not said.failure:
        yield Finding(_NAME, State.OK, f"uses {ways}", data=data)
    else:
        found = f"an RDMA port is up, and UCX sees no device: {said.failure or f'only {ways}'}"
        yield Finding(_NAME, State.PROBLEM, found, _remedy(name, said), data)


def _remedy(name: str, said: ucx.Ucx) -> str:
    """The first cause that is there, in the order in which they hide each other."""
    if not any(_VERBS.glob("uverbs*")):
        return "modprobe ib_uverbs; in a container: --device=/dev/infiniband"
    chosen = [each for each in _CHOICES if each in os.environ]
    if chosen and (seen := ucx.ask(name, _without(chosen), _PATIENCE_S).rdma):
        return f"unset {' '.join(chosen)}: without, it sees {seen[0]}"
    if _UNLOADED in said.complaints:
        return _links_to_drivers(name)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        return "ulimit -l unlimited (--ulimit memlock=-1): registered memory is locked"
    return "UCX_LOG_LEVEL=info says more"


def _links_to_drivers(name: str) -> str:
    """Commands that let NIXL's own libibverbs load the system's drivers, and those find it."""
    drivers = next((str(path) for each in _DRIVERS for path in Path("/").glob(each[1:])), "")
    if not drivers:
        return "install the drivers of its devices: apt-get install ibverbs-providers"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    libraries = Path(spec.origin).parent.with_suffix(".libs")
    verbs = next(libraries.glob("libibverbs-*.so*"), libraries / "libibverbs.so.1")
    return (
        "NIXL's own libibverbs cannot load the system's drivers. Before the program starts: "
        f"mkdir -p ~/verbs; ln -sf {verbs} ~/verbs/libibverbs.so.1; "
        f"export LD_LIBRARY_PATH=~/verbs:{drivers}"
    )


def _without(names: list[str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in names}


def _ports() -> list[Path]:
    return sorted(ucx.DEVICES.glob("*/ports/*"))


def _name(port: Path) -> str:
    return f"{port.parent.parent.name}:{port.name}"


def _state(port: Path) -> str:
    return (text_of(port / "state") or "?").strip().partition(": ")[2].lower() or "?"


def _gids_of(port: Path) -> str:
    gids = _ip_gids(port)
    return f"GID {', '.join(gids)}" if gids else "no GID of an IP address"


def _ip_gids(port: Path) -> list[str]:
    """The addresses by which RoCE reaches it; InfiniBand needs none, and has its own GIDs."""
    if "InfiniBand" in (text_of(port / "link_layer") or ""):
        return ["of InfiniBand"]
    addresses = []
    for file in sorted((port / "gids").glob("*")):
        address = ipaddress.IPv6Address((text_of(file) or "::").strip() or "::")
        if int(address) and not address.is_link_local:
            addresses.append(str(address.ipv4_mapped or address))
    return sorted(set(addresses))
