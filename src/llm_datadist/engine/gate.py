"""The gate of a link: transfers pass while it is open; shutting it waits for those inside."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Iterator


class Gate:
    """Counts the transfers on a link. Thread-safe; shut at first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._shut_because: str | None = "the link is still being made"

    @contextmanager
    def pass_through(self) -> Iterator[None]:
        """For one transfer. Raises LLMException(LLM_NOT_YET_LINK) when the gate is shut."""
        with self._changed:
            if self._shut_because is not None:
                raise LLMException(self._shut_because, LLMStatusCode.LLM_NOT_YET_LINK)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self._shut_because = None

    def shut(self, because: str) -> None:
        with self._changed:
            self._shut_because = because

    def drain(self, timeout_s: float) -> bool:
        """Shuts and waits for the transfers inside; False when some are still there."""
        with self._changed:
            self._shut_because = "the link is being unlinked"
            return self._changed.wait_for(lambda: not self._inside, timeout_s)
