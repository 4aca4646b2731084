"""The package as others meet it: commands in a folder that is not the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ascend-ci"


def run(args: Sequence[str | Path], folder: Path, timeout_s: float = 120.0) -> str:
    """What a command prints; fails the test with it when the command fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        args,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{args} in {folder}:\n{done.stdout}"
    return done.stdout


def run_pytest(folder: Path, python: str | Path = sys.executable) -> str:
    """`pytest` there, warnings as errors, leaving nothing behind."""
    pytest = [python, "-B", "-W", "error", "-m", "pytest", "-p", "no:cacheprovider"]
    return run([*pytest, "--rootdir", folder], folder)
