"""What cites the specification leads somewhere: from code, tests and pages, by section and row."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from citations import anchors, citations
from doc_blocks import DOCS, ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGES = [DOCS / "specification.md", *sorted((DOCS / "specification").glob("*.md"))]
ROWS = ROOT / "tests" / "conformance" / "rows.toml"
MAX_COLUMNS = 100

_HEADING = re.compile(r"^##+ (.*)$", re.MULTILINE)
_NUMBERED = re.compile(r'<a id="([^"]+)"></a>(?:Appendix )?([0-9A-Z.]*[0-9A-Z])\.? ')
_ROW = re.compile(r'^\| <a id="([^"]+)"></a>([^ ]+) \|', re.MULTILINE)
_SHORTCUT = re.compile(r"^\[([^\]]+)\]: ([^#\s]*)#(\S+)$", re.MULTILINE)


def cited_in(path: Path) -> Iterator[tuple[str, str]]:
    """What a file cites, with the line that does."""
    text = path.read_text()
    lines = text.splitlines()
    for cited in citations(text):
        number = text.count("\n", 0, cited.start)
        yield cited.anchor, f"{path.relative_to(ROOT)}:{number + 1}: {lines[number].strip()}"


def files_of(folder: str, pattern: str) -> list[Path]:
    return sorted((ROOT / folder).rglob(pattern))


@pytest.mark.parametrize(
    ("folder", "pattern", "fewest"),
    [("src", "*.py", 300), ("tests", "*.py", 50), ("tests", "*.toml", 50), ("docs", "*.md", 50)],
)
def test_every_citation_leads_to_a_place(folder: str, pattern: str, fewest: int) -> None:
    found = [each for path in files_of(folder, pattern) for each in cited_in(path)]
    assert len(found) >= fewest
    assert [where for anchor, where in found if anchor not in anchors()] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Spec 6.9.", ["s-6-9"]),
        ("Spec 5.", ["s-5"]),
        ("Spec\n    6.3, Appendix C.", ["s-6-3", "appendix-c"]),
        ("spec 6.9-6.11 with section 11 (O12)", ["s-6-9", "s-6-11", "s-11", "o12"]),
        ("Spec 4.4, 5.1, decisions D30 and O34.", ["s-4-4", "s-5-1", "d30", "o34"]),
        ("Spec 5.8, 12.1-12.3.", ["s-5-8", "line-1", "line-3"]),
        ("Spec 12, row 17; 3.9.", ["s-12", "line-17", "s-3-9"]),
        ("Spec 5; 10, rows 1, 3 and 5-9", ["s-5", "s-10"] + [f"error-{n}" for n in (1, 3, 5, 9)]),
        ("Spec 6.12, step 8.", ["s-6-12"]),
        ("Spec 7.2; seed 002", ["s-7-2", "seed-002"]),
        ("seeds 000 and 002", ["seed-000", "seed-002"]),
        ("built with -O3 and msgspec 0.22.0, SO_REUSEPORT, 3.10", []),
    ],
)
def test_a_citation_is_read_as_it_is_written(text: str, expected: list[str]) -> None:
    assert [cited.anchor for cited in citations(text)] == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_heading_has_the_anchor_of_its_number(page: Path) -> None:
    headings = _HEADING.findall(page.read_text())
    assert headings
    for heading in headings:
        found = _NUMBERED.match(heading)
        assert found, heading
        is_appendix = "Appendix" in heading
        prefix = "appendix-" if is_appendix else "s-"
        assert found[1] == prefix + found[2].lower().replace(".", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_link_leads_where_its_words_say(page: Path) -> None:
    shortcuts = _SHORTCUT.findall(page.read_text())
    assert shortcuts
    for words, target, anchor in shortcuts:
        name = words.upper()  # mdformat writes these small
        name = f"Appendix {name}" if name.isalpha() else name
        assert [cited.anchor for cited in citations(f"Spec {name}")] == [anchor]
        goes_to = (page.parent / target).resolve() if target else page
        assert DOCS / anchors()[anchor] == goes_to, f"[{words}] of {page.name}"


def test_no_two_places_have_one_anchor() -> None:
    found = [
        anchor for page in PAGES for anchor in re.findall(r'<a id="([^"]+)">', page.read_text())
    ]
    assert sorted(found) == sorted(anchors())


def test_the_decisions_are_complete() -> None:
    named = {row for page in PAGES for _, row in _ROW.findall(page.read_text())}
    assert {f"D{n}" for n in range(1, 36)} | {f"O{n}" for n in range(1, 37)} <= named


@pytest.mark.parametrize(("row", "anchor"), [("error", "error"), ("relies", "line")])
def test_each_error_and_each_line_is_a_row_of_the_conformance(row: str, anchor: str) -> None:
    rows = set(re.findall(rf'^"{row}\.(\d+)"', ROWS.read_text(), re.MULTILINE))
    places = {each.partition("-")[2] for each in anchors() if each.startswith(f"{anchor}-")}
    assert rows
    assert rows == places
