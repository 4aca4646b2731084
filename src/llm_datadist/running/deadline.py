"""Deadlines: the one clock of everything that waits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from llm_datadist.running.token import Token


class Deadline(NamedTuple):
    """A point in time that an operation must not outlast."""

    at: float
    timeout_s: float
    #: the call that has it, which may end in the middle of a wait; None where nothing can cut that
    token: Token | None = None

    @classmethod
    def after(cls, timeout_s: float, token: Token | None = None) -> Deadline:
        return cls(time.monotonic() + timeout_s, timeout_s, token)

    def remaining_s(self) -> float:
        return self.at - time.monotonic()

    def require(self, what: str) -> float:
        """The seconds left. Raises LLMException(LLM_TIMEOUT) when there are none."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise self.expired(what)
        return left

    def expired(self, what: str) -> LLMException:
        return LLMException(
            f"{what} timed out after {self.timeout_s:.3f} s", LLMStatusCode.LLM_TIMEOUT
        )
