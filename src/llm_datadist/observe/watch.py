"""Watching one operation while it runs: its phases, what it moved and how it ended."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from llm_datadist.core.plan import Planner
    from llm_datadist.core.remote import RemoteCache
    from llm_datadist.core.segments import Segments
    from llm_datadist.observe.recorder import Phases, Recorder
    from llm_datadist.observe.tracing import OperationSpan, Tracer

_OK = LLMStatusCode.LLM_SUCCESS


class Watch:
    """Runs from `with` to its end, then tells the recorder and the tracer. For one thread."""

    __slots__ = (
        "_begun_at", "_moving_at", "_operation", "_path", "_peer", "_planning_at", "_recorder",
        "_segments", "_span", "_statuses", "_tracer",
    )  # fmt: skip

    def __init__(
        self,
        recorder: Recorder | None,
        tracer: Tracer | None,
        operation: str,
        peer: int | None = None,
        path: str = "",
    ) -> None:
        self._recorder = recorder
        self._tracer = tracer
        self._operation = operation
        self._peer = peer
        self._path = path
        self._planning_at: float | None = None
        self._moving_at: float | None = None
        self._segments: Segments | None = None
        self._statuses: Sequence[LLMStatusCode] | None = None
        self._span: OperationSpan | None = None

    def __enter__(self) -> Self:
        if self._tracer is not None:
            self._span = self._tracer.start(self._operation, self._peer, self._path)
        self._begun_at = time.perf_counter()
        return self

    def timed(self, plan: Planner) -> Planner:
        """The planner, whose beginning ends the look-up and whose end begins the transfer.

        When the operation begins anew, because a cache was replaced, the last attempt counts.
        """

        def timed_plan(remote: RemoteCache, row: int) -> Segments:
            self._moving_at = None
            self._planning_at = time.perf_counter()
            segments = plan(remote, row)
            self._moving_at = time.perf_counter()
            self._segments = segments
            return segments

        return timed_plan

    def moves(self, segments: Segments) -> None:
        """What is moved from now on, where there is nothing to plan."""
        self._segments = segments
        self._moving_at = time.perf_counter()

    def ended(self, statuses: Sequence[LLMStatusCode]) -> None:
        """How it ended for each of the clusters that it concerns."""
        self._statuses = statuses

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        now = time.perf_counter()
        if error is not None:
            statuses: Sequence[LLMStatusCode] = (_status_of(error),)
        else:
            statuses = (_OK,) if self._statuses is None else self._statuses
        segments = None if error is not None else self._segments
        nbytes, count = (segments.total_nbytes, len(segments)) if segments is not None else (0, 0)
        if self._recorder is not None:
            failures = [status for status in statuses if status is not _OK]
            self._recorder.add(
                self._operation, self._peer, self._path, failures, self._phases(now),
                succeeded=len(statuses) - len(failures), nbytes=nbytes, num_segments=count,
            )  # fmt: skip
        if self._span is not None:
            self._span.end(statuses, nbytes, count, error)

    def _phases(self, now: float) -> Phases:
        begun, planning, moving = self._begun_at, self._planning_at, self._moving_at
        return (
            now - begun,
            None if planning is None else planning - begun,
            None if planning is None or moving is None else moving - planning,
            None if moving is None else now - moving,
        )


def _status_of(error: BaseException) -> LLMStatusCode:
    return error.status_code if isinstance(error, LLMException) else LLMStatusCode.LLM_FAILED
