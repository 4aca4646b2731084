"""The code in the READMEs runs as it is printed, and both languages print the same code."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from doc_blocks import READMES, ROOT, blocks_of

if TYPE_CHECKING:
    from pathlib import Path


def example_of(readme: Path) -> str:
    (block,) = (block for block in blocks_of(readme) if block.language == "python")
    return block.text


def test_the_example_pulls_the_blocks_that_it_names(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example_of(READMES[0]))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    linked, *blocks = done.stdout.splitlines()
    assert "LLM_SUCCESS" in linked
    assert blocks == ["[[1. 2. 2. 2. 2. 1. 2. 2.]", " [1. 2. 2. 2. 2. 1. 2. 2.]]"]


def test_both_languages_print_the_same_example() -> None:
    assert example_of(READMES[0]) == example_of(READMES[1])


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_somewhere(readme: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", readme.read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
