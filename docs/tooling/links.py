"""A hook of mkdocs: links out of `docs/`, to sources, tests and the like, are none on the site."""

from __future__ import annotations

import re

_LINK_OUT = re.compile(
    r"(?<!!)\[([^\]]+)\]\((?:\.\./)+(?:(?:tests|src|examples)/[^)]*|[A-Z]+\.md(?:#[^)]*)?)\)"
)


def on_page_markdown(markdown: str, **_: object) -> str:
    """The text of such a link stays, as code."""
    return _LINK_OUT.sub(r"`\1`", markdown)
