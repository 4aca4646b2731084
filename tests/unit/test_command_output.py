"""The command where its output cannot be written, and what the doctor says of NIXL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "llm_datadist"]


@pytest.mark.parametrize("args", [["docs", "quickstart"], ["doctor", "--no-measure"]])
def test_a_full_disk_is_one_line_and_no_finding(args: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [*COMMAND, *args], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert args[0] != "doctor" or ended.returncode != 1, "1 says that a problem was found"


def test_the_doctor_does_not_contradict_itself_about_nixl() -> None:
    ended = subprocess.run(
        [*COMMAND, "doctor", "--no-measure", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    findings = {each["name"]: each for each in json.loads(ended.stdout)["findings"]}
    if findings["NIXL"]["state"] != "ok":
        pytest.skip("no NIXL here")
    assert "not installed: nixl" not in findings["optional"]["found"]
