"""What UCX says of itself, in a process of its own."""

from __future__ import annotations

import os

import pytest

from llm_datadist.transport import ucx
from llm_datadist.transport.nixl_agent import package

needs_nixl = pytest.mark.skipif(
    package() is None, reason="NIXL is not installed: pip install --no-deps nixl-cu12"
)


@needs_nixl
def test_it_says_what_it_can_use() -> None:
    said = ucx.ask(package() or "")
    assert said.failure == ""
    assert ucx.Way("tcp", "lo") in said.ways
    assert not set(said.rdma) & {way for way in said.ways if way.transport == "tcp"}


@needs_nixl
def test_its_variables_count() -> None:
    said = ucx.ask(package() or "", {**os.environ, "UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"})
    assert said.ways == (ucx.Way("tcp", "lo"),)


@needs_nixl
def test_that_it_cannot_be_started_is_said() -> None:
    said = ucx.ask(package() or "", {**os.environ, "UCX_TLS": "nothing"})
    assert said.ways == ()
    assert "cannot be started" in said.failure


def test_that_there_is_no_nixl_is_said() -> None:
    said = ucx.ask("no_such_package")
    assert said.ways == ()
    assert "no_such_package" in said.failure


@pytest.mark.parametrize(
    ("name", "is_rdma"),
    [("rc_verbs", True), ("dc_mlx5", True), ("ud_verbs", True), ("tcp", False), ("sysv", False)],
)
def test_which_transports_are_rdma(name: str, is_rdma: bool) -> None:
    assert ucx.Way(name, "mlx5_0:1").is_rdma is is_rdma
