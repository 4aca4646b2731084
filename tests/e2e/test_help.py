"""What every verb has in common: help that wraps, and terminals that cannot show everything."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

VERBS = ((), ("demo",), ("docs",), ("doctor",), ("top",), ("bench",), ("bench", "plan"))


def said(*arguments: str, **env: str) -> str:
    command = [sys.executable, "-m", "llm_datadist", *arguments]
    done = subprocess.run(
        command, env=os.environ | env, capture_output=True, check=False, timeout=60
    )
    assert b"Traceback" not in done.stderr
    return done.stdout.decode("ascii" if "PYTHONIOENCODING" in env else "utf-8")


@pytest.mark.parametrize("verb", ["demo", "docs", "top", "bench"])
@pytest.mark.parametrize("width", [80, 200])
def test_paragraphs_are_broken_where_the_terminal_ends(verb: str, width: int) -> None:
    page = said(verb, "--help", COLUMNS=str(width))
    prose = page[: page.index("\u256d")]
    paragraphs = re.split(r"\n\s*\n", prose.strip())
    assert len(paragraphs) >= 3
    for paragraph in paragraphs:
        *full, _last = (line.strip() for line in paragraph.splitlines())
        assert all(len(line) > width - 24 for line in full), paragraph


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_terminal_that_knows_ascii_only(verb: tuple[str, ...]) -> None:
    assert "Usage:" in said(*verb, "--help", PYTHONIOENCODING="ascii")


def test_what_cannot_be_shown_is_spelt() -> None:
    page = said("doctor", "--no-measure", "--listen", "0.0.0.0:0", PYTHONIOENCODING="ascii")
    assert "-> set LLM_DATADIST_LINK_SECURITY" in page
