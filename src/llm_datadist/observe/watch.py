"""Watching operations while they run: their phases, what they moved and how they ended."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.observe.recorder import NEVER, Recorder
from llm_datadist.observe.tracing import Tracer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.pattern import Windows
    from llm_datadist.observe.recorder import Series
    from llm_datadist.observe.tracing import OperationSpan
    from llm_datadist.options import Options

_SUCCESS = (LLMStatusCode.LLM_SUCCESS,)


class Watch:
    """Runs from its making to the end of `with`, then tells series and span. For one thread."""

    _segments: Pieces | Windows | None = None
    _statuses: Sequence[LLMStatusCode] = _SUCCESS
    _planning_at = _moving_at = NEVER

    def __init__(self, series: Series | None, span: OperationSpan | None = None) -> None:
        self._series = series
        self._span = span
        self._begun_at = perf_counter()

    def plans(self) -> None:
        """The look-up is over, the plan begins.

        When the operation begins anew, because a cache was replaced, the last attempt counts.
        """
        self._moving_at = NEVER
        self._planning_at = perf_counter()

    def moves(self, segments: Pieces | Windows) -> None:
        """The plan is there, and is carried out from now on."""
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


class Observer:
    """Watches what the options say: counts it, traces it, or both. Thread-safe."""

    def __init__(self, recorder: Recorder | None, tracer: Tracer | None) -> None:
        #: counts what links and peers do, too; None when metrics are off
        self.recorder = recorder
        self._tracer = tracer

    @classmethod
    def of(cls, cluster_id: int, options: Options) -> Observer | None:
        """None, which costs nothing, when nobody looks.

        Raises LLMException(LLM_FEATURE_NOT_ENABLED) for `tracing` without its package.
        """
        if not (options.metrics or options.tracing):
            return None
        recorder = Recorder() if options.metrics else None
        return cls(recorder, Tracer(cluster_id) if options.tracing else None)

    def watch(self, operation: str, peer: int | None = None, path: str = "") -> Watch:
        """Begins to watch an operation; its end is that of `with`."""
        recorder, tracer = self.recorder, self._tracer
        return Watch(
            None if recorder is None else recorder.series(operation, peer, path),
            None if tracer is None else tracer.start(operation, peer, path),
        )


def _status_of(error: BaseException) -> LLMStatusCode:
    return error.status_code if isinstance(error, LLMException) else LLMStatusCode.LLM_FAILED
