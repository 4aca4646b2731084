"""The version, in the package and on the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import llm_datadist

#: the command as installed, and as a module of whatever is imported
COMMANDS = [
    [str(Path(sys.executable).with_name("llm-datadist"))],
    [sys.executable, "-m", "llm_datadist"],
    [sys.executable, "-m", "llm_datadist.cli"],
]


def test_the_package_has_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z.]+\d+)?", llm_datadist.__version__)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: Path(command[-1]).name)
def test_the_command_says_which_it_is(command: list[str]) -> None:
    assert printed(*command, "--version") == f"llm-datadist {llm_datadist.__version__}\n"


def test_the_module_is_the_command() -> None:
    said = printed(sys.executable, "-m", "llm_datadist", "--help")
    assert "Usage: llm-datadist " in said
    assert all(verb in said for verb in ("demo", "doctor", "top", "bench"))


def printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
