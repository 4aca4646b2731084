"""What UCX, which NIXL moves bytes with, can use on this machine.

A port that is up is not yet one that UCX can use: its library may lack the device's driver, its
variables may forbid it. So UCX itself is asked, in another process: it loads much, and may end the
process that it is in.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from llm_datadist.system_errors import pass_on_handlers

if TYPE_CHECKING:
    from collections.abc import Mapping

#: the RDMA devices that the kernel knows
DEVICES: Final = Path("/sys/class/infiniband")
_PROBE: Final = Path(__file__).with_name("ucx_probe.py")
_WAIT_S: Final = 30.0
_RESOURCE: Final = re.compile(r" -- ([\w.]+)/(\S+)$", re.MULTILINE)
#: how the names of UCX's transports over RDMA begin
_RDMA: Final = ("rc_", "dc_", "ud_", "srd_", "gga_")


class Way(NamedTuple):
    """One of UCX's transports, and the device that it uses."""

    transport: str
    device: str

    @property
    def is_rdma(self) -> bool:
        return self.transport.startswith(_RDMA)

    def __str__(self) -> str:
        return f"{self.transport} on {self.device}"


class Ucx(NamedTuple):
    """What it said."""

    ways: tuple[Way, ...]
    #: why it cannot be started; empty where it can
    failure: str
    #: all that it and its libraries complained of
    complaints: str

    @property
    def rdma(self) -> tuple[Way, ...]:
        return tuple(way for way in self.ways if way.is_rdma)


def has_active_port() -> bool:
    """Whether a port of an RDMA device is up."""
    return any(map(_is_active, DEVICES.glob("*/ports/*/state")))


def _is_active(state: Path) -> bool:
    """ "4: ACTIVE"."""
    try:
        return "ACTIVE" in state.read_text()
    except OSError as error:  # it was unplugged
        pass_on_handlers(error)
        return False


def ask(
    package: str, environment: Mapping[str, str] = os.environ, timeout_s: float = _WAIT_S
) -> Ucx:
    """Asks the UCX of that package of NIXL's. Takes a third of a second."""
    command = [sys.executable, str(_PROBE), package]
    try:
        said = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s,
            env=dict(environment), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Ucx((), f"it takes longer than {timeout_s:.0f} s", "")
    except OSError as error:
        pass_on_handlers(error)
        return Ucx((), f"no Python to ask it with: {error.strerror}", "")
    ways = tuple(Way(*found) for found in _RESOURCE.findall(said.stdout))
    failure = ""
    if said.returncode < 0:
        failure = f"it ends the process by signal {-said.returncode}"
    elif said.returncode:
        failure = (said.stderr.splitlines() or ["?"])[-1]
    return Ucx(ways, failure, said.stderr)
