"""What the source says to people, found by its syntax; `…` stands for what is put in.

A message is a text in what is raised or made an exception, in what is logged as a warning or worse,
in what refuses or ends a link, and in what the doctor finds to mend or good to know.
"""

from __future__ import annotations

import ast
import builtins
import re
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from doc_blocks import DOCS, ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

#: what goes wrong with links, transfers and memory; and all other messages
PAGES = TROUBLESHOOTING, OTHERS = DOCS / "troubleshooting.md", DOCS / "messages.md"
SOURCE = ROOT / "src"
#: what makes an exception, and is neither raised at once nor a class of the source
_MAKERS = {"invalid", "typer.BadParameter", "super().__init__"}
_LOG_METHODS = {"warning", "error", "exception", "critical", "warn"}
#: what takes the reason why a link is refused, or ends, or a call does
_ENDS = {"Verdict", "Outcome", "Refused", "Door", "refuse", "_refuse", "_fail", "cut", "shut"}
#: of the doctor's findings, those that ask for something
_STATES = {"State.PROBLEM", "State.NOTE"}
#: takes what was waited for, and makes one message of it
_EXPIRED = "expired"


class Message(NamedTuple):
    place: str
    text: str


def quoted(page: Path) -> list[str]:
    """What a page quotes: code that begins a paragraph or a table's row, if it is a sentence."""
    runs = re.findall(r"(?:^\| |(?<=\n\n))((?:`[^`]+`(?:, )?)+)", page.read_text(), re.MULTILINE)
    codes = [code for run in runs for code in re.findall(r"`([^`]+)`", run)]
    return [code for code in codes if " " in code]


@cache
def said() -> tuple[Message, ...]:
    """Every message of the source, but those that consist of other texts alone."""
    return tuple(said_in({str(f.relative_to(ROOT)): f.read_text() for f in SOURCE.rglob("*.py")}))


def said_in(sources: Mapping[str, str]) -> Iterable[Message]:
    """The same of other sources, by name; each once."""
    trees = {name: ast.parse(source) for name, source in sources.items()}
    exceptions = _exceptions(trees.values())
    found = (
        Message(f"{name}:{line}: {text}", text)
        for name, tree in trees.items()
        for saying in _sayings(tree, exceptions)
        for line, text in _texts(saying)
        if has_words(text)
    )
    return dict.fromkeys(found)


def has_words(text: str) -> bool:
    """Whether it says something by itself: two words at least."""
    return len(re.findall("[A-Za-z]{2,}", text)) > 1


@cache
def templates() -> frozenset[str]:
    """Every text of the source, whatever it is for."""
    trees = [ast.parse(file.read_text()) for file in SOURCE.rglob("*.py")]
    texts = (_text(node) for tree in trees for node in ast.walk(tree))
    return frozenset(text for text in texts if text is not None)


def _exceptions(trees: Iterable[ast.Module]) -> set[str]:
    """The names of all classes of exceptions, those of the source included."""
    classes = {
        node.name: {ast.unparse(base) for base in node.bases}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    kinds = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
    known = {name for name, kind in kinds.items() if issubclass(kind, BaseException)}
    while more := {name for name, bases in classes.items() if bases & known} - known:
        known |= more
    return known


def _sayings(tree: ast.Module, exceptions: set[str]) -> Iterator[ast.expr]:
    """What has a message among its arguments, or is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if _name_of(node.exc) != _EXPIRED:
                yield node.exc
        elif isinstance(node, ast.Call):
            name = _name_of(node)
            is_exception = ast.unparse(node.func) in exceptions | _MAKERS
            if is_exception or name in _LOG_METHODS or name in _ENDS:
                yield node
            elif ast.unparse(node.func) == "Finding" and ast.unparse(node.args[1]) in _STATES:
                yield node.args[2]


def _name_of(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _texts(node: ast.AST) -> Iterator[tuple[int, str]]:
    """The outermost texts, with their lines."""
    text = _text(node)
    if text is not None:
        yield getattr(node, "lineno", 0), text
        return
    for child in ast.iter_child_nodes(node):
        yield from _texts(child)


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        parts = (str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
        return re.sub("…+", "…", "".join(parts))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%#?(\.\d)?[sdfxr]", "…", node.value)
    return None
