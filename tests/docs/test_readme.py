"""The code in the READMEs runs as it is printed, alike in both languages; links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from doc_blocks import READMES, ROOT, blocks_of

if TYPE_CHECKING:
    from pathlib import Path


def examples_of(readme: Path) -> list[str]:
    return [block.text for block in blocks_of(readme) if block.language == "python"]


def output_of(example: str, directory: Path) -> list[str]:
    script = directory / "example.py"
    script.write_text(example)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.splitlines()


def test_every_example_is_run_here() -> None:
    assert len(examples_of(READMES[0])) == 2


def test_the_first_example_pulls_the_blocks_that_it_names(tmp_path: Path) -> None:
    linked, *blocks = output_of(examples_of(READMES[0])[0], tmp_path)
    assert "LLM_SUCCESS" in linked
    assert blocks == ["[[1. 2. 2. 2. 2. 1. 2. 2.]", " [1. 2. 2. 2. 2. 1. 2. 2.]]"]


def test_the_second_example_keeps_what_it_wrote(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    printed = output_of(examples_of(READMES[0])[1], tmp_path)
    assert printed == ["torch.bfloat16 (8, 1024) 1.5"]


def test_both_languages_print_the_same_examples() -> None:
    assert examples_of(READMES[0]) == examples_of(READMES[1])


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
