"""The guide: its code runs, and its table is what `make fleet` prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from fleet.stage import Fleet

PAGE = Path(__file__).parents[2] / "docs" / "fleet.md"


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert "folder:/shared/fleet" in block
    script = tmp_path / "example.py"
    script.write_text(block.replace("/shared/fleet", str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_table_has_what_is_done(tmp_path: Path) -> None:
    kinds = [kind for kind in Fleet(tmp_path, None).kinds() if not kind.startswith("folder")]
    rows = re.findall(r"^\| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    assert {*kinds, "etcd killed, and back"} <= set(rows)
