"""A hook of mkdocs: where a page cites the specification ("Spec 6.9, O11"), it links to it.

Citations are read here for the tests as well, which prove that each leads to an anchor.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

DOCS = Path(__file__).parents[1]

_ANCHOR = re.compile(r'<a id="([^"]+)"></a>')
_NUMBER = r"\d{1,2}(?:\.\d{1,2})?"
_DECISION = r"(?<![\w-])[OD]\d{1,2}\b"
_APPENDIX = r"\bAppendix [A-Z]\b"
#: what may stand in a list of sections behind the word "Spec"
_ITEM = rf"(?:{_NUMBER}|{_DECISION}|{_APPENDIX}|(?:decision|row|line|step)s?(?=\s))"
_BETWEEN = r"(?:-|[,;]?\s+(?:(?:and|to)\s+)?)"
_CITED = re.compile(
    rf"\b(?:[Ss]pec(?:ification)?|[Ss]ections?)\s+(?P<sections>{_ITEM}(?:{_BETWEEN}{_ITEM})*)"
    rf"|\b[Ss]eeds?\s+(?P<seeds>\d{{3}}\b(?:{_BETWEEN}\d{{3}}\b)*)"
    rf"|{_DECISION}|{_APPENDIX}"
)
_PART = re.compile(rf"{_ITEM}|\d{{3}}|;")
#: in which a page has no links of its own
_CLOSED = re.compile(r"<(/?)(?:a|code|pre|h[1-6]|script|style)\b")


class Citation(NamedTuple):
    """A part of a text that names a place in the specification."""

    start: int
    end: int
    anchor: str


def citations(text: str) -> Iterator[Citation]:
    """What a text cites, in order. A place need not exist."""
    for found in _CITED.finditer(text):
        if found["seeds"]:
            for part in re.finditer(r"\d{3}", found["seeds"]):
                yield _at(found.start("seeds"), part, f"seed-{part[0]}")
        elif found["sections"]:
            yield from _in_list(found["sections"], found.start("sections"))
        else:
            yield Citation(found.start(), found.end(), _anchor_of(found[0]))


def _in_list(text: str, start: int) -> Iterator[Citation]:
    """In "10, rows 1 and 3; 6.9" the numbers behind "rows" are rows, up to the semicolon."""
    section, unit = "", ""
    for part in _PART.finditer(text):
        word = part[0]
        if word == ";":
            unit = ""
        elif word.rstrip("s") in ("decision", "row", "line", "step"):
            unit = word.rstrip("s")
        elif unit in ("row", "line") and word.isdigit():
            yield _at(start, part, f"{'error' if section == '10' else 'line'}-{word}")
        elif unit != "step":
            section = word
            yield _at(start, part, _anchor_of(word))


def _at(start: int, part: re.Match[str], anchor: str) -> Citation:
    return Citation(start + part.start(), start + part.end(), anchor)


def _anchor_of(name: str) -> str:
    if name.startswith("Appendix"):
        return name.lower().replace(" ", "-")
    if name[0] in "DO":
        return name.lower()
    section, _, rest = name.partition(".")
    if section == "12" and rest:  # its lines are cited as sections
        return f"line-{rest}"
    return f"s-{name.replace('.', '-')}"


@cache
def anchors() -> Mapping[str, str]:
    """The pages of the specification, by the anchors on them."""
    pages = [DOCS / "specification.md", *sorted((DOCS / "specification").glob("*.md"))]
    return {
        anchor: str(page.relative_to(DOCS))
        for page in pages
        for anchor in _ANCHOR.findall(page.read_text())
    }


def on_page_content(html: str, page: Page, files: Files, **_: object) -> str:
    """Links in what is text; the specification itself links by hand."""
    if page.file.src_uri.startswith("specification"):
        return html
    parts: list[str] = []
    depth = 0
    for part in re.split(r"(<[^>]+>)", html):
        if tag := _CLOSED.match(part):
            depth += -1 if tag[1] else 1
        parts.append(part if depth or part.startswith("<") else _linked(part, page, files))
    return "".join(parts)


def _linked(text: str, page: Page, files: Files) -> str:
    parts, end = [], 0
    for cited in citations(text):
        target = files.get_file_from_path(anchors().get(cited.anchor, ""))
        if target is not None:
            url = f"{target.url_relative_to(page.file)}#{cited.anchor}"
            words = text[cited.start : cited.end]
            parts += [text[end : cited.start], f'<a href="{url}">{words}</a>']
            end = cited.end
    return "".join([*parts, text[end:]])
