"""The check of CI that nothing is installed past the lock, on environments that are made up."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import outside

if TYPE_CHECKING:
    from pathlib import Path

LOCK = """
# a comment
numpy==2.4.6
    # via
    #   torch
torch==2.13.0
typing-extensions==4.16.0
old==1.0 ; python_full_version < '3.10'
old==2.0 ; python_full_version >= '3.10'
not-here==3.0
"""
INSTALLED = {
    "llm-datadist": "9.9",
    "numpy": "2.4.6",
    "torch": "2.13.0+cpu",
    "typing_extensions": "4.16.0",
    "old": "2.0",
}


def check(folder: Path, installed: dict[str, str]) -> tuple[int, list[str]]:
    """The exit code and the lines."""
    for name, version in installed.items():
        metadata = folder / "site" / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lock = folder / "lock.txt"
    lock.write_text(LOCK)
    script = outside.ROOT / "tooling" / "locked.py"
    command = [sys.executable, str(script), str(lock), str(folder / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_what_is_locked_passes(tmp_path: Path) -> None:
    assert check(tmp_path, INSTALLED) == (0, ["4 packages are as lock.txt says"])


def test_another_version_and_a_package_without_one_are_named(tmp_path: Path) -> None:
    installed = {**INSTALLED, "numpy": "2.4.7", "stranger": "1.0", "old": "1.0"}
    assert check(tmp_path, installed) == (
        1,
        [
            "numpy 2.4.7 is installed, and lock.txt has 2.4.6",
            "old 1.0 is installed, and lock.txt has 2.0",
            "stranger 1.0 is installed, and lock.txt has none",
        ],
    )
