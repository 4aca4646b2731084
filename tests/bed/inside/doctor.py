"""What doctor says where there is an RDMA device, and that its remedies work when followed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from bed.inside.soft_roce import DEVICE, NETDEV, make_device, set_netdev
from llm_datadist.transport.nixl import is_worthwhile


@pytest.fixture(autouse=True, scope="module")
def device() -> None:
    make_device()


def findings(before: str = "", **environment: str) -> dict[str, dict[str, Any]]:
    """Of a doctor in a shell that has been told something before; by name."""
    doctor = f"{sys.executable} -m llm_datadist doctor --no-measure --json"
    said = subprocess.run(
        ["bash", "-c", f"{before or 'true'}; {doctor}"], env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {each["name"]: each for each in json.loads(said.stdout)["findings"]}


def test_the_wheels_library_lacks_the_drivers_and_the_remedy_works() -> None:
    found = findings()["UCX"]
    assert found["state"] == "problem", found
    assert "sees no device" in found["found"]
    assert not is_worthwhile(), "links do without what UCX cannot use"
    _, _, commands = found["remedy"].partition("Before the program starts: ")
    assert commands
    mended = findings(commands)["UCX"]
    assert mended["state"] == "ok", mended
    assert f"rc_verbs on {DEVICE}:1" in mended["found"]


def test_a_variable_that_forbids_it_is_named() -> None:
    remedy = findings()["UCX"]["remedy"].partition("Before the program starts: ")[2]
    found = findings(remedy, UCX_TLS="tcp,self")["UCX"]
    assert found["state"] == "problem"
    assert found["remedy"].startswith(f"unset UCX_TLS: without, it sees rc_verbs on {DEVICE}:1")


def test_the_ports_state_and_gids() -> None:
    said = findings()["RDMA"]["found"]
    assert f"{DEVICE}:1 active, GID 192.0.2.1" in said
    set_netdev("down")
    try:
        found = findings()
        assert f"{DEVICE}:1 down" in found["RDMA"]["found"]
        assert "ip link set INTERFACE up" in found["RDMA"]["remedy"]
        assert found["UCX"]["state"] == "ok", "there is nothing that it could use"
        assert not is_worthwhile()
    finally:
        set_netdev("up")
    subprocess.run(f"ip addr flush dev {NETDEV}".split(), check=True)
    try:
        assert "give its interface one" in findings()["RDMA"]["remedy"]
    finally:
        subprocess.run(f"ip addr add 192.0.2.1/24 dev {NETDEV}".split(), check=True)


def test_memory_that_may_not_be_locked() -> None:
    assert findings()["memlock"]["state"] == "ok"
    found = findings("ulimit -l 64")["memlock"]
    assert found["state"] == "problem"
    assert "ulimit -l unlimited" in found["remedy"]
