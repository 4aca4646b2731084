"""RDMA without a card: the kernel's RoCE in software over an interface of its own."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Final

#: one end of a pair of virtual interfaces, which needs the other to be up
NETDEV, _OTHER_END = "rx0", "rx1"
DEVICE: Final = "rxe0"
PORT: Final = Path(f"/sys/class/infiniband/{DEVICE}/ports/1")
COUNTERS: Final = PORT / "hw_counters"
#: nothing but RDMA
UCX: Final = {"UCX_TLS": "rc_v,ud_v,self", "UCX_NET_DEVICES": f"{DEVICE}:1"}
_DRIVERS: Final = "/usr/lib/x86_64-linux-gnu/libibverbs"


def make_device() -> None:
    for command in (
        f"ip link add {NETDEV} type veth peer name {_OTHER_END}",
        f"ip addr add 192.0.2.1/24 dev {NETDEV}",
        f"ip link set {NETDEV} up",
        f"ip link set {_OTHER_END} up",
    ):
        subprocess.run(command.split(), check=True)
    add_device(NETDEV)


def set_netdev(state: str) -> None:
    """Its interface goes up or down, and the device's port with it."""
    subprocess.run(["ip", "link", "set", NETDEV, state], check=True)


def add_device(netdev: str) -> None:
    command = ["rdma", "link", "add", DEVICE, "type", "rxe", "netdev", netdev]
    subprocess.run(command, check=True)


def remedy() -> str:
    """For LD_LIBRARY_PATH: has NIXL's libibverbs find Debian's drivers, and those find it."""
    package = importlib.util.find_spec("nixl_cu12")
    assert package is not None
    assert package.origin is not None
    libraries = Path(package.origin).parent.with_suffix(".libs")
    (verbs,) = libraries.glob("libibverbs-*.so*")
    folder = Path("/run/verbs")
    folder.mkdir(exist_ok=True)
    (folder / "libibverbs.so.1").symlink_to(verbs)
    return f"{folder}:{_DRIVERS}"
