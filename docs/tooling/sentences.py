"""Begins a new line behind each Chinese sentence of the given pages, for diffs that can be read.

A tool that wraps at spaces finds none there. Tables, headings and code stay as they are; mdformat,
which `make format` runs next, indents what has become a line of its own. `--check` changes nothing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

#: the end of a sentence, unless it closes a bracket, a quotation or an emphasis
END = re.compile(r"(?<=[。！？])(?=[^\s。！？）」』”’*])")  # noqa: RUF001
_CODE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


def split(text: str) -> str:
    """The page with one sentence a line."""
    pieces, end = [], 0
    for code in _CODE.finditer(text):
        pieces += [_split_prose(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, _split_prose(text[end:])])


def _split_prose(text: str) -> str:
    return "\n".join(
        line if line.lstrip().startswith(("|", "#")) else END.sub("\n", line)
        for line in text.split("\n")
    )


def main(arguments: list[str]) -> str | None:
    """Changes the pages; with `--check` only says which it would change."""
    pages = [Path(argument) for argument in arguments if argument != "--check"]
    texts = {page: page.read_text() for page in pages}
    changed = {page: new for page, text in texts.items() if (new := split(text)) != text}
    if "--check" not in arguments:
        for page, text in changed.items():
            page.write_text(text)
    elif changed:
        return f"run make format: sentences share a line in {', '.join(map(str, changed))}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
