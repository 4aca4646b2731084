"""The gate of a link: transfers pass while it is open; shutting it waits for those inside."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from llm_datadist.observe.recorder import Recorder


class Gate:
    """Counts the transfers on a link: each runs under `with gate`. Thread-safe; shut at first."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder
        #: taken as itself by transfers: a Condition's own `with` costs three times as much
        self._lock = threading.Lock()
        self._empty = threading.Condition(self._lock)
        self._inside = 0
        self._shut_because: str | None = "the link is still being made"

    def __enter__(self) -> None:
        """Raises LLMException(LLM_NOT_YET_LINK) when the gate is shut."""
        with self._lock:
            if self._shut_because is not None:
                raise LLMException(self._shut_because, LLMStatusCode.LLM_NOT_YET_LINK)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._shut_because is not None:
                self._empty.notify_all()

    def open(self) -> None:
        with self._lock:
            self._shut_because = None

    def shut(self, because: str) -> None:
        with self._lock:
            self._shut_because = because

    def drain(self, timeout_s: float) -> bool:
        """Shuts and waits for the transfers inside; False when some are still there."""
        with self._lock:
            self._shut_because = "the link is being unlinked"
            if not self._inside:
                return True
            with self._recorder.waiting("gate") if self._recorder else nullcontext():
                return self._empty.wait_for(lambda: not self._inside, timeout_s)

    @property
    def num_inside(self) -> int:
        return self._inside
