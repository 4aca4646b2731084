"""A hook of the build: the README as an index shows it, where no link leads into a checkout."""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:)([^)\s]+)\)")


class Description(MetadataHookInterface):
    """The package's long description."""

    def update(self, metadata: dict[str, object]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": described(text)}


def described(text: str) -> str:
    """Pages by the command that shows them, which is in the package as they are."""
    return _LINK.sub(_by_command, text)


def _by_command(link: re.Match[str]) -> str:
    words, target = link.groups()
    page = re.fullmatch(r"docs/([\w/-]+)\.md(#.+)?", target)
    if page is None:
        return words
    command = f"`llm-datadist docs {page[1]}{page[2] or ''}`"
    return command if words.startswith("docs/") else f"{words} ({command})"
