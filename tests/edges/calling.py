"""Threads that are in the middle of a call when something ends."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from llm_datadist import LLMException
from soak.stage import Doing

if TYPE_CHECKING:
    from edges.user import User
    from llm_datadist import LLMStatusCode


class Calling:
    """A thread that calls a verb until it fails."""

    def __init__(self, user: User, verb: str) -> None:
        self._call = user.verbs[verb]
        self.succeeded = 0
        self.began = threading.Event()
        self._thread = Doing(self._run)

    def _run(self) -> LLMStatusCode:
        self.began.set()
        try:
            while True:
                self._call()
                self.succeeded += 1
        except LLMException as error:
            return error.status_code

    def ended_with(self) -> LLMStatusCode:
        """Raises what is no LLMException, and TimeoutError for a call that hangs."""
        status: LLMStatusCode = self._thread.result(10)
        return status
