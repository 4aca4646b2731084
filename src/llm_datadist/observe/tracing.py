"""OpenTelemetry spans: one for each public operation. Needs the extra `tracing`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.trace import Span

_SCOPE = "llm_datadist"


class Tracer:
    """Starts the spans of one cluster, of the program's tracer provider. Thread-safe.

    Raises LLMException(LLM_FEATURE_NOT_ENABLED) where opentelemetry-api is not installed.
    """

    def __init__(self, cluster_id: int) -> None:
        try:
            from opentelemetry import context, trace
        except ImportError:
            raise LLMException(
                "tracing needs opentelemetry-api: pip install opentelemetry-api",
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            ) from None
        self._cluster_id = cluster_id
        self._context = context
        self._tracer = trace.get_tracer(_SCOPE)
        self._inside = context.create_key("llm-datadist-operation")

    def start(self, operation: str, peer: int | None, path: str) -> OperationSpan | None:
        """None within another operation: the layers of a transfer have no spans of their own."""
        context = self._context
        if context.get_value(self._inside):
            return None
        span = self._tracer.start_span(f"{_SCOPE}.{operation}")
        # as texts: ids have 64 bits without a sign, OpenTelemetry's integers have one
        span.set_attribute(f"{_SCOPE}.cluster_id", str(self._cluster_id))
        if peer is not None:
            span.set_attribute(f"{_SCOPE}.peer", str(peer))
        if path:
            span.set_attribute(f"{_SCOPE}.path", path)
        token = context.attach(context.set_value(self._inside, True))
        return OperationSpan(span, lambda: context.detach(token))


class OperationSpan:
    """The span of an operation that runs."""

    def __init__(self, span: Span, detach: Callable[[], None]) -> None:
        self._span = span
        self._detach = detach

    def end(
        self,
        statuses: Sequence[LLMStatusCode],
        nbytes: int,
        num_segments: int,
        error: BaseException | None,
    ) -> None:
        """In the thread that started it."""
        self._detach()
        span = self._span
        failures = [status.name for status in statuses if status is not LLMStatusCode.LLM_SUCCESS]
        span.set_attribute(f"{_SCOPE}.status", failures[-1] if failures else "LLM_SUCCESS")
        if len(statuses) != 1:
            span.set_attribute(f"{_SCOPE}.num_clusters", len(statuses))
        if num_segments:
            span.set_attribute(f"{_SCOPE}.nbytes", nbytes)
            span.set_attribute(f"{_SCOPE}.num_segments", num_segments)
        if failures:
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR, str(error or ", ".join(failures)))
        span.end()
