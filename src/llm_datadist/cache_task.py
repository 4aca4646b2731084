"""CacheTask: what becomes of a layer-wise transfer. Spec 3.10, 6.12."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, final

from llm_datadist.checks import check_uint32
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.running.bell import Latch
from llm_datadist.running.forks import FORKED

if TYPE_CHECKING:
    from collections.abc import Sequence


@final
class CacheTask:
    """A layer-wise transfer under way, with one result per destination. Thread-safe.

    Made by `CacheManager.transfer_cache_async`. A time-out of the methods here does not stop the
    transfer: they may be called again. `unfinished` is what they call a transfer that still runs.
    """

    def __init__(
        self, num_destinations: int, unfinished: LLMStatusCode = LLMStatusCode.LLM_TIMEOUT
    ) -> None:
        self._unfinished = unfinished
        self._results: Sequence[LLMStatusCode | None] = [None] * num_destinations
        self._done = Latch()
        self._process = os.getpid()

    def synchronize(self, timeout_in_millis: int | None = None) -> LLMStatusCode:
        """Waits for the end; the first failure among the destinations, else LLM_SUCCESS.

        LLM_TIMEOUT (in the v1 mode LLM_WAIT_PROCESS_TIMEOUT) when the transfer still runs after so
        many milliseconds; None waits for ever, 0 asks. Raises TypeError, ValueError unless it is a
        uint32 or None; LLMException (LLM_FAILED) in a forked child, which cannot see the end.
        """
        if not self._wait(timeout_in_millis):
            return self._unfinished
        failures = (r for r in self._results if r not in (None, LLMStatusCode.LLM_SUCCESS))
        return next(failures, None) or LLMStatusCode.LLM_SUCCESS

    def get_results(self, timeout_in_millis: int | None = None) -> list[LLMStatusCode | None]:
        """Waits for the end; one result per destination, in the order of the configs.

        None means that the transfer ended before this destination had all its layers, because the
        synchronizer refused one. While it still runs each result is what `synchronize` returns.
        Raises as `synchronize`.
        """
        if not self._wait(timeout_in_millis):
            return [self._unfinished] * len(self._results)
        return list(self._results)

    def _wait(self, timeout_in_millis: int | None) -> bool:
        if timeout_in_millis is not None:
            check_uint32("timeout_in_millis", timeout_in_millis)
        if not self._done.is_set and os.getpid() != self._process:
            raise LLMException(
                f"the end of this transfer cannot be seen here: {FORKED}", LLMStatusCode.LLM_FAILED
            )
        return self._done.wait(None if timeout_in_millis is None else timeout_in_millis / 1000)

    def _complete(self, results: Sequence[LLMStatusCode | None]) -> None:
        """For the transfer's thread, once."""
        self._results = results
        self._done.set()
