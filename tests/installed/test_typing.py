"""The types that the package tells others: a project that uses it, strictly checked outside."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

import outside
import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(outside.EXAMPLE / "kv_connector.py", tmp_path)
    return tmp_path


@pytest.mark.long
def test_mypy(folder: Path) -> None:
    said = outside.run([sys.executable, "-m", "mypy", "--strict", "kv_connector.py"], folder)
    assert "no issues found in 1 source file" in said


def test_pyright(folder: Path) -> None:
    config = {"typeCheckingMode": "strict", "pythonVersion": "3.10"}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    python = ["--pythonpath", sys.executable]
    command = [sys.executable, "-m", "basedpyright", *python, "kv_connector.py"]
    assert "0 errors, 0 warnings" in outside.run(command, folder)
