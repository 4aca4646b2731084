"""Yama: whether one process may read another's memory, and what is said where it may not."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from typer.testing import CliRunner

from llm_datadist.cli import app
from llm_datadist.errors import LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from collections.abc import Iterator

_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
_PR_SET_PTRACER = 0x59616D61
_CAPABILITIES_VERSION, _CAP_SYS_PTRACE = 0x20080522, 19
_LINK_TIMEOUT_MS = 60_000


class Case(NamedTuple):
    """A scope, what is allowed beyond it, and what must be said."""

    scope: int
    #: the owner lets processes of its user read it
    has_grant: bool
    #: CAP_SYS_PTRACE: the processes are root's
    has_capability: bool
    path: str
    #: in the reason why there is no better path
    reason: str
    #: what doctor finds
    state: str
    remedy: str


#: in this order: scope 3 is for good
CASES = [
    Case(0, True, False, "cma", "", "ok", ""),
    Case(0, False, False, "cma", "", "ok", ""),
    Case(1, True, False, "cma", "", "ok", ""),
    Case(1, False, False, "tcp", "ptrace_scope is 1", "ok", ""),
    Case(1, False, True, "cma", "", "ok", ""),
    Case(2, True, False, "tcp", "lower kernel.yama.ptrace_scope to 1", "problem", "sysctl"),
    Case(2, False, False, "tcp", "lower kernel.yama.ptrace_scope to 1", "problem", "sysctl"),
    Case(2, False, True, "cma", "", "ok", ""),
    Case(3, True, False, "tcp", "until the next boot", "problem", "/etc/sysctl.d"),
    Case(3, False, True, "tcp", "until the next boot", "problem", "/etc/sysctl.d"),
]


def _name(case: Case) -> str:
    grant = "grant" if case.has_grant else "no grant"
    return f"scope {case.scope}, {grant}{', capability' if case.has_capability else ''}"


@pytest.fixture(scope="module")
def mighty() -> Iterator[tuple[NodeProcess, NodeProcess]]:
    """An owner and a reader that have all capabilities."""
    with NodeProcess() as owner, NodeProcess() as reader:
        yield owner, reader


@pytest.fixture(scope="module")
def others() -> Iterator[tuple[NodeProcess, NodeProcess]]:
    """An owner and a reader of the same user as each other, without the capability."""
    with NodeProcess() as owner, NodeProcess() as reader:
        for process in (owner, reader):
            process.call(lose_the_capability)
        yield owner, reader


def lose_the_capability(node: Node) -> None:
    """All threads that are started from here on are without it, too."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    # effective, permitted and inheritable, the lower halves first
    sets = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0
    for each in range(3):
        sets[each] &= ~(1 << _CAP_SYS_PTRACE)
    assert libc.capset(header, sets) == 0


def take_back_the_grant(node: Node) -> None:
    assert ctypes.CDLL(None).prctl(_PR_SET_PTRACER, 0, 0, 0, 0) == 0


def paths(node: Node) -> list[tuple[str, str]]:
    return [(link.path, link.path_reason) for link in node.datadist.links()]


def doctors_findings(node: Node) -> dict[str, dict[str, object]]:
    said = CliRunner().invoke(app, ["doctor", "--no-measure", "--json"])
    return {each["name"]: each for each in json.loads(said.stdout)["findings"]}


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_the_path_its_reason_and_what_doctor_says(
    case: Case,
    mighty: tuple[NodeProcess, NodeProcess],
    others: tuple[NodeProcess, NodeProcess],
) -> None:
    owner, reader = mighty if case.has_capability else others
    _SCOPE.write_text(str(case.scope))
    try:
        port = owner.call(Node.start, LLMRole.MIX, 1, listen_ip_info="127.0.0.1:0")
        reader.call(Node.start, LLMRole.MIX, 2)
        for process in (owner, reader):
            if not case.has_grant:
                process.call(take_back_the_grant)
        assert reader.call(Node.link, port, 1, _LINK_TIMEOUT_MS) is LLMStatusCode.LLM_SUCCESS
        for process in (owner, reader):
            [(path, reason)] = process.call(paths)
            assert path == case.path
            assert case.reason in reason
            assert bool(case.reason) == bool(reason), reason
    finally:
        for process in (owner, reader):
            process.call(Node.stop)
    findings = reader.call(doctors_findings)
    found, capability = findings["ptrace scope"], findings["capability"]
    assert found["data"] == {"scope": case.scope}
    assert found["state"] == case.state, found
    assert case.remedy in str(found["remedy"])
    assert bool(case.remedy) == bool(found["remedy"])
    assert capability["data"] == {"cap_sys_ptrace": case.has_capability, "uid": 0}
