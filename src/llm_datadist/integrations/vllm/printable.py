"""Text of others, as it may stand in a line of the log."""

from __future__ import annotations

from llm_datadist.core.words import escaped


def printable(text: object, most: int = 500) -> str:
    """The text on one line, without control characters, and not longer than `most`.

    What is in the middle is left out: an error says first what was done, and last what came of it.
    """
    return _cut(escaped(_cut(str(text), most)), most)


def shown_id(request_id: str) -> str:
    """A request's id, which its client may choose (X-Request-Id)."""
    return printable(request_id, 100)


def _cut(text: str, most: int) -> str:
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"
