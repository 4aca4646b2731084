"""Lines of prose that a person can read in a diff: `make format` breaks those that are too long."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from doc_blocks import DOCS, READMES, ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_COLUMNS = 100
#: written by a program
GENERATED = {DOCS / "conformance.md"}
PAGES = {
    *ROOT.glob("*.md"),
    *DOCS.glob("*.md"),
    *DOCS.glob("specification/*.md"),
    *(ROOT / "changes").glob("*.md"),
} - GENERATED
CHINESE = {*(DOCS / "zh").glob("*.md"), READMES[1]}

_CODE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
#: what has no place to break at: code, and where a link leads
_UNBREAKABLE = re.compile(r"`[^`]+`|\]\([^)]+\)")


def prose_of(text: str) -> Iterator[str]:
    """The lines that are neither code, nor a table's, nor a heading."""
    for line in _CODE.sub("", text).splitlines():
        if not line.lstrip().startswith(("|", "#")):
            yield line


def is_too_long(line: str) -> bool:
    """Whether it has more columns than allowed, and a space to break it at."""
    solid = _UNBREAKABLE.sub(lambda found: "x" * len(found[0]), line)
    return len(line) > MAX_COLUMNS and " " in solid.lstrip(" -*>0123456789.")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", sorted(PAGES - CHINESE), ids=name_of)
def test_no_line_of_prose_is_too_long(page: Path) -> None:
    assert [line for line in prose_of(page.read_text()) if is_too_long(line)] == []


WORDS = "words " * 17


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(WORDS, [True], id="prose"),
        pytest.param(f"- {WORDS}", [True], id="a list"),
        pytest.param("x" * 101, [False], id="nowhere to break"),
        pytest.param(f"- `{WORDS}`", [False], id="code in a line"),
        pytest.param(f"    ```\n{WORDS}\n    ```", [], id="a block of code"),
        pytest.param(f"| {WORDS} |\n# {WORDS}", [], id="a table, a heading"),
    ],
)
def test_which_lines_are_too_long(text: str, expected: list[bool]) -> None:
    assert [is_too_long(line) for line in prose_of(text)] == expected


def run_sentences(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DOCS / "tooling" / "sentences.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_chinese_sentence_begins_a_line() -> None:
    checked = run_sentences("--check", *CHINESE)
    assert checked.returncode == 0, checked.stderr


def test_chinese_sentences_are_parted_and_all_else_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    rest = "| 一。二。 |\n# 一。二。\n```\n一。二。\n```\n"
    page.write_text(f"一。二「三。」。\n{rest}")
    refused = run_sentences("--check", page)
    assert (refused.returncode, str(page) in refused.stderr) == (1, True)
    assert run_sentences(page).returncode == 0
    assert page.read_text() == f"一。\n二「三。」。\n{rest}"
