"""The real command, and what it says to programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from llm_datadist.cli import app
from llm_datadist.options import BASE_PORT_VARIABLE, PATH_VARIABLE, SECURITY_VARIABLE

#: what denies the program in its arguments the memory of other processes, as some containers do
WITHOUT_FOREIGN_MEMORY = (
    sys.executable, str(Path(__file__).parents[1] / "sandbox.py"),
)  # fmt: skip
_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""
_TIMEOUT_S = 60
_SETTINGS = (PATH_VARIABLE, SECURITY_VARIABLE, BASE_PORT_VARIABLE)
_FIELDS = {"section": str, "name": str, "state": str, "found": str, "remedy": str, "data": dict}
_STATES = {"ok", "note", "unavailable", "problem"}


class Said(NamedTuple):
    """What the doctor said."""

    code: int
    findings: dict[str, dict[str, Any]]  #: by name

    def state_of(self, name: str) -> str:
        return str(self.findings[name]["state"])

    def problems(self) -> set[str]:
        return {name for name in self.findings if self.state_of(name) == "problem"}

    def text(self, name: str) -> str:
        """What was found, and the remedy."""
        finding = self.findings[name]
        return f"{finding['found']} → {finding['remedy']}"


def limited_to(descriptors: int) -> tuple[str, ...]:
    """What lets the program in its arguments have so many descriptors."""
    return (sys.executable, "-c", _LIMITED, str(descriptors))


def doctor(
    *arguments: str, wrapper: tuple[str, ...] = (), security: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs `llm-datadist doctor` in an environment without settings of ours but these."""
    command = [*wrapper, sys.executable, "-m", "llm_datadist", "doctor", *arguments]
    kept = {name: text for name, text in os.environ.items() if name not in _SETTINGS}
    if security:
        env[SECURITY_VARIABLE] = security
    return subprocess.run(
        command, env=kept | env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )


def ask(*arguments: str, measures: bool = False, **how: Any) -> Said:
    """What `--json` says, in a process of its own."""
    done = doctor("--json", "--measure" if measures else "--no-measure", *arguments, **how)
    return _understand(done.returncode, done.stdout)


def ask_here(*arguments: str, security: str = "", **env: str) -> Said:
    """The same without measuring, in this process: a second saved."""
    settings = {**dict.fromkeys(_SETTINGS), SECURITY_VARIABLE: security or None, **env}
    command = ["doctor", "--json", "--no-measure", *arguments]
    done = CliRunner().invoke(app, command, env=settings)
    return _understand(done.exit_code, done.output)


def _understand(code: int, text: str) -> Said:
    """The form is asserted here, and that the exit code agrees with the findings."""
    outcome = json.loads(text)
    assert set(outcome) == {"state", "findings"}
    for finding in outcome["findings"]:
        assert {name: type(value) for name, value in finding.items()} == _FIELDS
        assert finding["state"] in _STATES
        assert "\n" not in finding["remedy"]
    findings = {finding["name"]: finding for finding in outcome["findings"]}
    assert len(findings) == len(outcome["findings"])
    said = Said(code, findings)
    assert (said.code, outcome["state"]) == ((1, "problem") if said.problems() else (0, "ok"))
    return said
