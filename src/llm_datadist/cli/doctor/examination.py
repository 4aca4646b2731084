"""All checks, in the order of the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.cli.doctor import access, hardware, limits, network, peer, speed, versions
from llm_datadist.cli.doctor.finding import Case, Check, Finding, State
from llm_datadist.cli.doctor.log_book import log_book
from llm_datadist.errors import LLMException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FACTS: dict[str, tuple[Check, ...]] = {
    "same host (cma)": (
        access.foreign_memory, access.yama, access.capability, access.pid_namespace
    ),
    "network": (network.listening, network.link_security, network.allowed_path),
    "other paths": (hardware.nixl, hardware.rdma, hardware.gpus),
    "limits": (
        limits.descriptors, limits.memory, limits.shared_memory, limits.locked_memory,
        limits.huge_pages,
    ),
    "versions": (versions.installed, versions.system, versions.extras),
}  # fmt: skip


class Section(NamedTuple):
    """Findings under one heading."""

    title: str
    findings: list[Finding]


def examine(case: Case, *, measures: bool, show: Callable[[str], None]) -> list[Section]:
    """Runs the checks; `show` is told which section is looked at."""
    checks = dict(_FACTS)
    if measures:
        checks = {"speed": (speed.paths,), **checks}
    if case.peer is not None:
        checks = {"peer": (peer.running_cluster,), **checks}
    sections = []
    with log_book():  # else the log would be printed among the findings
        for title, group in checks.items():
            show(title)
            findings = [finding for check in group for finding in _findings(check, case)]
            sections.append(Section(title, findings))
    return sections


def _findings(check: Check, case: Case) -> Iterator[Finding]:
    try:
        yield from check(case)
    except LLMException as error:
        yield Finding(_name_of(check), State.PROBLEM, f"no cluster works here: {error}")
    except Exception as error:  # the others are worth having all the same
        found = f"could not be checked: {type(error).__name__}: {error}"
        yield Finding(
            _name_of(check), State.PROBLEM, found, "if the rest is fine, please report this"
        )


def _name_of(check: Check) -> str:
    return check.__name__.replace("_", " ")
