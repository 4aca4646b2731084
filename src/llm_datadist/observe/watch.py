"""Watching one operation while it runs: its phases, what it moved and how it ended."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.observe.recorder import NEVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from llm_datadist.core.plan import Planner
    from llm_datadist.core.remote import RemoteCache
    from llm_datadist.core.segments import Segments
    from llm_datadist.observe.recorder import Series
    from llm_datadist.observe.tracing import OperationSpan

_SUCCESS = (LLMStatusCode.LLM_SUCCESS,)


class Watch:
    """Runs from its making to the end of `with`, then tells series and span. For one thread."""

    _segments: Segments | None = None
    _statuses: Sequence[LLMStatusCode] = _SUCCESS
    _planning_at = _moving_at = NEVER

    def __init__(self, series: Series | None, span: OperationSpan | None = None) -> None:
        self._series = series
        self._span = span
        self._begun_at = perf_counter()

    def timed(self, plan: Planner) -> Planner:
        """The planner, whose beginning ends the look-up and whose end begins the transfer.

        When the operation begins anew, because a cache was replaced, the last attempt counts.
        """

        def timed_plan(remote: RemoteCache, row: int) -> Segments:
            self._moving_at = NEVER
            self._planning_at = perf_counter()
            segments = self._segments = plan(remote, row)
            self._moving_at = perf_counter()
            return segments

        return timed_plan

    def moves(self, segments: Segments) -> None:
        """What is moved from now on, where there is nothing to plan."""
        self._segments = segments
        self._moving_at = perf_counter()

    def ended(self, statuses: Sequence[LLMStatusCode]) -> None:
        """How it ended for each of the clusters that it concerns."""
        self._statuses = statuses

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        ended_at = perf_counter()
        segments = self._segments if error is None else None
        nbytes, count = (0, 0) if segments is None else (segments.total_nbytes, len(segments))
        statuses = self._statuses if error is None else (_status_of(error),)
        if self._series is not None:
            failures = () if statuses is _SUCCESS else [each for each in statuses if each]
            succeeded = len(statuses) - len(failures)
            record = (
                self._begun_at, self._planning_at, self._moving_at, ended_at,
                succeeded, nbytes, count,
            )  # fmt: skip
            self._series.add(record, failures)
        if self._span is not None:
            self._span.end(statuses, nbytes, count, error)


def _status_of(error: BaseException) -> LLMStatusCode:
    return error.status_code if isinstance(error, LLMException) else LLMStatusCode.LLM_FAILED
