"""`llm-datadist docs`: every page, every link of it, and what it looks like on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import pytest
from doc_blocks import DOCS, READMES, ROOT, blocks_of
from typer.testing import CliRunner

from llm_datadist.cli import app

if TYPE_CHECKING:
    from pathlib import Path

PAGES = sorted(str(page.relative_to(DOCS)).removesuffix(".md") for page in DOCS.rglob("*.md"))
COMMAND = [sys.executable, "-m", "llm_datadist", "docs"]
LINK = re.compile(r"\]\(((?!https?:)[^)\s]+)")
CITED = re.compile(r"Spec \d+(?:\.\d+)?")
MENTION = re.compile(r"llm-datadist docs ([\w/.#-]+\w)")


def docs(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["docs", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def on_a_terminal(*arguments: str, pager: str) -> str:
    """What is shown on 80 columns and 24 lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    environment = {**os.environ, "PAGER": pager, "TERM": "dumb"}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    try:
        while more := os.read(ours, 65536):
            shown += more
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    return shown.decode().replace("\r\n", "\n")


def test_without_a_page_all_are_listed() -> None:
    _, _, *rows = docs().splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_shown_with_its_code_and_links_that_can_be_asked_for(
    page: str, tmp_path: Path
) -> None:
    shown = docs(page)
    (tmp_path / "page.md").write_text(shown)
    assert blocks_of(tmp_path / "page.md") == blocks_of(DOCS / f"{page}.md")
    assert "<a id" not in shown
    for target in set(LINK.findall(shown)):
        docs(target)


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        pytest.param("doctor", "# The doctor\n", "no more.\n", id="a page"),
        pytest.param("docs/doctor.md", "# The doctor\n", "no more.\n", id="a page by its file"),
        pytest.param("doctor#for-programs", "## For programs\n", "|\n\n", id="a section"),
        pytest.param("5.2", "### 5.2 finalize()\n", "\n\n", id="a section of the specification"),
        pytest.param("Spec 5.2", "### 5.2 finalize()\n", "\n\n", id="as docstrings cite it"),
        pytest.param("Appendix C", "## Appendix C. The v1 mode\n", "\n", id="an appendix"),
    ],
)
def test_what_can_be_asked_for(asked: str, first: str, last: str) -> None:
    shown = docs(asked)
    assert shown.startswith(first)
    assert shown.endswith(last)
    level = first.partition(" ")[0]
    assert shown.count(f"\n{level} ") == 0


def test_a_decision_is_a_row_below_the_head_of_its_table() -> None:
    head, rule, row = docs("O19").splitlines()
    assert head.startswith("| Decision |")
    assert rule.startswith("| -- |")
    assert row.startswith("| O19 |")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("docter", "docs: there is no page 'docter': is doctor meant?"),
        ("x", "docs: there is no page 'x': llm-datadist docs lists them"),
        ("doctor#x", "docs: the page doctor has no section 'x': llm-datadist docs doctor"),
        ("99.9", "docs: the specification has no 99.9: llm-datadist docs specification"),
    ],
)
def test_what_there_is_not_is_said_in_a_line(asked: str, said: str) -> None:
    done = CliRunner().invoke(app, ["docs", asked])
    assert (done.exit_code, done.output) == (2, said + "\n")


def test_in_a_pipe_a_message_is_one_line() -> None:
    done = subprocess.run([*COMMAND, "messages"], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if "its data_type is None" in line]
    assert "\x1b" not in done.stdout


def test_on_a_terminal_it_fits_or_goes_through_the_pager() -> None:
    assert "by the pager" not in on_a_terminal("O19", pager="echo by the pager; cat")
    shown = on_a_terminal("troubleshooting", pager="echo by the pager; cat")
    assert shown.startswith("by the pager\n")
    assert max(map(len, shown.splitlines())) <= 80
    # a word that is longer than its column goes on in the next line
    assert re.search(r"\n \(LLMDataDist\.llm_engine_ .*\n instance\.finalize\(\)\) ", shown)


def test_what_docstrings_cite_can_be_asked_for() -> None:
    sources = (ROOT / "src").rglob("*.py")
    cited = {each for source in sources for each in CITED.findall(source.read_text())}
    assert len(cited) > 30
    for section in cited:
        docs(section)


def test_what_mentions_a_page_can_be_followed() -> None:
    texts = [readme.read_text() for readme in READMES]
    helps = [CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200"}).output
             for verb in ([], ["bench"], ["demo"], ["docs"], ["doctor"], ["top"])]  # fmt: skip
    mentioned = {page for text in (*texts, *helps) for page in MENTION.findall(text)}
    assert mentioned >= {"quickstart", "performance", "transformers", "doctor", "observability"}
    for page in mentioned:
        docs(page)
