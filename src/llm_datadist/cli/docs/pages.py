"""The pages: in the package, or beside it in a checkout; their sections, and where links lead.

A page is named by its file without `.md`; links on it, too, are written so here, and those to files
that are no pages are none.
"""

from __future__ import annotations

import posixpath
import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.cli.failure import SetupError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: where the wheel has them, and where a checkout does
_PLACES = (Path(__file__).parents[2] / "pages", Path(__file__).parents[4] / "docs")

_LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
#: `[6.9]: caches.md#s-6-9`: sections can be asked for by these numbers
_DEFINITION = re.compile(r"^\[[^\]]+\]: \S+\n?", re.MULTILINE)
_ANCHOR = re.compile(r'<a id="([^"]+)"></a>')
#: what mkdocs puts the docstrings of a name in for, with its options
_REFERENCE = re.compile(r"^::: (\S+)\n(?: +.*\n)*", re.MULTILINE)
_CITED = re.compile(r"(?:[Ss]pec )?([0-9]+(?:\.[0-9]+)*|[DO][0-9]+|Appendix [CH])")


class Line(NamedTuple):
    text: str
    #: of a heading, 1 for the page's own; 0 for what is none
    level: int
    anchors: list[str]


class Page(NamedTuple):
    name: str
    text: str

    @property
    def title(self) -> str:
        return self.text.partition("\n")[0].lstrip("# ")

    def all(self) -> str:
        """The whole page."""
        return "".join(line.text for line in _lines(self.text))

    def section(self, anchor: str) -> str | None:
        """What is below the heading with that anchor, or the line of it; None without one."""
        lines = list(_lines(self.text))
        at = next((i for i, line in enumerate(lines) if anchor in line.anchors), None)
        if at is None:
            return None
        if not lines[at].level:
            return _row(lines, at) if lines[at].text.startswith("|") else lines[at].text
        ends = (i for i in range(at + 1, len(lines)) if 0 < lines[i].level <= lines[at].level)
        return "".join(line.text for line in lines[at : next(ends, len(lines))])


@cache
def pages() -> dict[str, Page]:
    """All of them, by name."""
    folder = next(place for place in _PLACES if (place / "index.md").is_file())
    files = {str(file.relative_to(folder))[: -len(".md")]: file for file in folder.rglob("*.md")}
    return {name: _read(name, file, set(files)) for name, file in sorted(files.items())}


def find(wanted: str) -> str:
    """The text of a page, of a section of it, or of what "Spec 6.9" means. Raises SetupError."""
    known = pages()
    if cited := _CITED.fullmatch(wanted):
        return _cited(cited[1], known)
    name, _, anchor = wanted.partition("#")
    name = name.removeprefix("docs/").removesuffix(".md")
    if name not in known:
        near = get_close_matches(name, known, 1)
        hint = f"is {near[0]} meant?" if near else "llm-datadist docs lists them"
        raise SetupError(f"there is no page {name!r}: {hint}")
    if not anchor:
        return known[name].all()
    section = known[name].section(anchor)
    if section is None:
        raise SetupError(f"the page {name} has no section {anchor!r}: llm-datadist docs {name}")
    return section


def _cited(number: str, known: dict[str, Page]) -> str:
    anchor = number.lower().replace(" ", "-")
    if number[0].isdigit():
        lines = number.startswith("12.")  # its lines are cited as sections
        anchor = f"line-{number[3:]}" if lines else f"s-{number.replace('.', '-')}"
    for name, page in known.items():
        section = page.section(anchor) if name.startswith("specification") else None
        if section is not None:
            return section
    raise SetupError(f"the specification has no {number}: llm-datadist docs specification")


def _read(name: str, file: Path, known: set[str]) -> Page:
    text = _DEFINITION.sub("", file.read_text(encoding="utf-8"))
    text = _REFERENCE.sub(r'- <a id="\1"></a>`python -m pydoc \1`\n', text)

    def rewritten(link: re.Match[str]) -> str:
        is_picture, words, target = link.groups()
        if is_picture:
            return f"*Picture: {words}*"
        if "://" in target:
            return link[0]
        path, _, anchor = target.partition("#")
        leads_to = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        page = leads_to.removesuffix(".md") if path else name
        if page not in known:
            return words
        return f"[{words}]({page}{'#' if anchor else ''}{anchor})"

    return Page(name, _LINK.sub(rewritten, text))


def _lines(text: str) -> Iterator[Line]:
    is_code = False
    for line in text.splitlines(keepends=True):
        is_code ^= line.lstrip().startswith("```")
        marks = 0 if is_code else len(line) - len(line.lstrip("#"))
        slugs = [_slug(line)] if marks else []
        yield Line(_ANCHOR.sub("", line), marks, [*slugs, *_ANCHOR.findall(line)])


def _row(lines: list[Line], at: int) -> str:
    """A row below the head of its table."""
    head = at
    while lines[head - 1].text.startswith("|"):
        head -= 1
    return "".join(line.text for line in (*lines[head : head + 2], lines[at]))


def _slug(heading: str) -> str:
    """The anchor that mkdocs gives a heading."""
    words = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
    return re.sub(r"[-\s]+", "-", words)
