"""An extension of griffe: documents the attributes whose words it does not find by itself.

These are the options of LLMConfig, which carry theirs as an argument, and what has a comment `#:`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

from griffe import Attribute, Docstring, Extension

if TYPE_CHECKING:
    from griffe import ObjectNode

_COMMENT = re.compile(r"#: (.*)$")


class AttributeDocs(Extension):
    """Loaded by mkdocs.yml."""

    def on_attribute_instance(
        self, *, node: ast.AST | ObjectNode, attr: Attribute, **_: object
    ) -> None:
        match node:
            case ast.Assign(
                value=ast.Call(
                    func=ast.Subscript(value=ast.Name(id="Option"), slice=kind), args=[words, *_]
                )
            ):
                attr.docstring = Docstring(ast.literal_eval(words), parent=attr)
                attr.annotation, attr.value = ast.unparse(kind), None
            case ast.Assign() | ast.AnnAssign() if attr.docstring is None:
                if comment := _comment_at(attr):
                    attr.docstring = Docstring(comment, parent=attr)


def _comment_at(attr: Attribute) -> str:
    """The comment at the end of the attribute's line, or on those in front of it."""
    assert isinstance(attr.filepath, Path)  # a package without a file has no attributes
    lines, number = attr.lines_collection[attr.filepath], (attr.lineno or 1) - 1
    if found := _COMMENT.search(lines[number]):
        return found[1]
    words: list[str] = []
    while number and (found := _COMMENT.match(lines[number - 1].strip())):
        words.insert(0, found[1])
        number -= 1
    return " ".join(words)
