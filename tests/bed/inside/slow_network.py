"""A slow network: the kernel's netem on the cable between two hosts, and iperf3 to measure it.

Each end sends through a netem of its own, so a delay is one way, a round trip has it twice, and a
loss is of each direction. Where packets are lost or change places they are single ones: the
interfaces would hand on up to 64 KiB as one otherwise.

What netem holds back is its queue, too: it is twice as long as what the network holds, else the
sender would be slowed down by a queue that is too short, or never hear that the network is full.
"""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Final, NamedTuple

from two_hosts import CABLE, HOSTS

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

_PACKET_NBYTES: Final = 1500
_WARM_UP_S: Final = 1
TURN_S: Final = 3


class Network(NamedTuple):
    """What the cable does to packets, in each direction."""

    delay_ms: float = 0.0
    #: percent
    loss: int = 0
    reorder: int = 0
    mbit_per_s: int = 0

    def __str__(self) -> str:
        parts = [f"{self.delay_ms:g} ms"]
        parts += [f"{self.loss} % lost"] if self.loss else []
        parts += [f"{self.reorder} % out of order"] if self.reorder else []
        parts += [f"{self.mbit_per_s} Mbit"] if self.mbit_per_s else []
        return ", ".join(parts)

    @property
    def nbytes_per_s(self) -> float:
        return self.mbit_per_s * 1e6 / 8

    def netem(self) -> list[str]:
        """As `tc` takes it."""
        under_way = self.nbytes_per_s * 2 * self.delay_ms / 1000 / _PACKET_NBYTES
        words = ["delay", f"{self.delay_ms}ms", "limit"]
        words.append(str(200 + int(2 * under_way) if self.mbit_per_s else 20_000))
        words += ["loss", f"{self.loss}%"] if self.loss else []
        words += ["reorder", f"{self.reorder}%"] if self.reorder else []
        return [*words, "rate", f"{self.mbit_per_s}mbit"] if self.mbit_per_s else words


# -- run by the hosts ------------------------------------------------------------------------------


def behave(node: Node, network: Network) -> None:
    """Has this end of the cable send like that."""
    if network.loss or network.reorder:
        _run("ethtool", "-K", CABLE, "tso", "off", "gso", "off")
    _run("tc", "qdisc", "replace", "dev", CABLE, "root", "netem", *network.netem())


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def serve_iperf(node: Node) -> None:
    """Once, by an iperf3 that listens when this returns."""
    command = ["iperf3", "--server", "--one-off", "--forceflush"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    while "listening" not in (said := server.stdout.readline()):
        assert said, "iperf3 does not listen"
    _servers.append(server)


_servers: list[subprocess.Popen[str]] = []


def iperf(node: Node, streams: int, turn_s: int) -> float:
    """Bytes per second that come from the other host."""
    command = [
        *("iperf3", "--client", HOSTS[0], "--reverse", "--parallel", str(streams), "--json"),
        *("--omit", str(_WARM_UP_S), "--time", str(turn_s)),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 8
