"""What a check takes and says; what the doctor says of it all: a screen for people, JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from llm_datadist.endpoint import Endpoint


#: what programs read
Data: TypeAlias = "Mapping[str, str | int | float | bool]"


class State(str, Enum):
    """How it stands with one thing."""

    OK = "ok"
    NOTE = "note"  #: good to know; nothing has to be mended
    UNAVAILABLE = "unavailable"  #: it is not there, and nothing is wrong with that
    PROBLEM = "problem"  #: something will not work, or be slow or unsafe, until it is mended


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    name: str
    state: State
    found: str
    remedy: str = ""  #: what to do, in a line
    data: Data = field(default_factory=dict)  #: the same for programs
    brief: str = ""  #: what was found, in a word or two, if that is worth one


@dataclass(frozen=True, slots=True)
class Case:
    """What the doctor was asked to look at, besides this process and its environment."""

    listen: Endpoint | None = None
    peer: Endpoint | None = None


Check: TypeAlias = "Callable[[Case], Iterable[Finding]]"


class Section(NamedTuple):
    """Findings under one heading."""

    title: str
    findings: list[Finding]


_STYLES = {
    State.OK: "green", State.NOTE: "cyan", State.UNAVAILABLE: "dim", State.PROBLEM: "bold red",
}  # fmt: skip


class Report:
    """The outcome of all checks."""

    def __init__(self, sections: Sequence[Section]) -> None:
        self._sections = sections
        self._problems = [
            finding.name
            for section in sections
            for finding in section.findings
            if finding.state is State.PROBLEM
        ]

    @property
    def has_problems(self) -> bool:
        return bool(self._problems)

    def to_json(self) -> str:
        """`state`, and a flat list of findings; a name can be in several sections."""
        findings = [
            {"section": section.title, **_for_programs(finding)}
            for section in self._sections
            for finding in section.findings
        ]
        state = State.PROBLEM if self._problems else State.OK
        return json.dumps({"state": state, "findings": findings}, indent=2, allow_nan=False)

    def to_screen(self) -> Group:
        """One row a finding, the remedy below it."""
        table = Table.grid(padding=(0, 2))
        for _ in range(2):
            table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for section in self._sections:
            table.add_row(Text(section.title, "bold"))
            for finding in section.findings:
                table.add_row(*_cells(finding))
        return Group(table, "", self._verdict())

    def to_brief_screen(self) -> Group:
        """What is to be done and known first; what is as it should be by its name alone."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for heading, state in (("to mend", State.PROBLEM), ("good to know", State.NOTE)):
            found = self._in_state(state)
            if found:
                table.add_row(Text(heading, _STYLES[state]))
            for finding in found:
                table.add_row(Text(f"  {finding.name}"), _cells(finding)[2])
        fine = [(section.title, _names(section, State.OK)) for section in self._sections]
        if any(names for _, names in fine):
            table.add_row(Text("as it should be", _STYLES[State.OK]))
        for title, names in fine:
            if names:
                table.add_row(Text(f"  {title}"), Text(names))
        missing = self._in_state(State.UNAVAILABLE)
        if missing:
            names = ", ".join(finding.name for finding in missing)
            table.add_row(Text("not here", _STYLES[State.UNAVAILABLE]), Text(names, "dim"))
        return Group(table, "", self._verdict().append("; --all says more", "not bold dim"))

    def _in_state(self, state: State) -> list[Finding]:
        return [
            finding
            for section in self._sections
            for finding in section.findings
            if finding.state is state
        ]

    def _verdict(self) -> Text:
        if not self._problems:
            return Text("doctor: nothing to mend", "bold green")
        return Text(f"doctor: to mend: {', '.join(self._problems)}", "bold red")


def _names(section: Section, state: State) -> str:
    return ", ".join(
        f"{finding.name} {finding.brief}".rstrip()
        for finding in section.findings
        if finding.state is state
    )


def _for_programs(finding: Finding) -> dict[str, object]:
    fields = asdict(finding)
    del fields["brief"]  # `data` has the figures
    return fields


def _cells(finding: Finding) -> tuple[Text, Text, Text]:
    found = Text(finding.found)
    if finding.remedy:
        found.append(f"\n→ {finding.remedy}", "yellow" if finding.state is State.PROBLEM else "dim")
    style = _STYLES[finding.state]
    return Text(f"  {finding.state.value}", style), Text(finding.name), found
