"""What the doctor says of loopback, and of the ports of rank tables."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
from doctor_command import Said, ask, ask_here

from llm_datadist.options import BASE_PORT_VARIABLE

#: a host of its own, on which nothing is set up yet
NEW_HOST = ("unshare", "--net", "sh", "-c")

needs_root = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("unshare") is None, reason="a host of its own needs root"
)


def on_new_host(script: str, **env: Any) -> Said:
    """What is said on a host of its own, in which the script ran first."""
    return ask(wrapper=(*NEW_HOST, f'{script}; exec "$@"', "sh"), **env)


@needs_root
def test_loopback_that_is_down_is_said() -> None:
    said = on_new_host(":")
    assert said.state_of("loopback") == "problem"
    assert "nobody reaches 127.0.0.1" in said.text("loopback")
    assert "ip link set lo up" in said.text("loopback")
    assert on_new_host("ip link set lo up").state_of("loopback") == "ok"


@needs_root
@pytest.mark.parametrize(
    ("given", "reserved", "base", "state"),
    [
        ("32768 60999", "", "", "ok"),
        ("32768 60999", "", "60000", "note"),
        ("32768 60999", "", "60990", "note"),
        ("1024 65535", "", "", "note"),
        ("1024 65535", "61000-61015", "", "ok"),
        ("1024 65535", "80,60999-61010", "", "note"),
        ("32768 60999", "", "65535", "ok"),
    ],
)
def test_ports_of_rank_tables_that_calls_can_have_are_said(
    given: str, reserved: str, base: str, state: str
) -> None:
    script = (
        f'echo "{given}" > /proc/sys/net/ipv4/ip_local_port_range; '
        f'echo "{reserved}" > /proc/sys/net/ipv4/ip_local_reserved_ports'
    )
    env = {BASE_PORT_VARIABLE: base} if base else {}
    said = on_new_host(script, **env)
    assert said.state_of("rank tables") == state
    if state == "note":
        assert f"which get {' to '.join(given.split())}" in said.text("rank tables")
        assert "ip_local_reserved_ports=" in said.text("rank tables")


def test_a_base_port_that_is_none_is_said() -> None:
    said = ask_here(**{BASE_PORT_VARIABLE: "sixty"})
    assert said.state_of("rank tables") == "problem"
    assert f"unset {BASE_PORT_VARIABLE}" in said.text("rank tables")
