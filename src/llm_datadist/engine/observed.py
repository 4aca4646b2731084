"""The engine that is looked into: the same engine, and each operation is watched.

It is a class of its own so that an engine which nobody looks into pays nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.engine.engine import Engine
from llm_datadist.observe.recorder import Recorder
from llm_datadist.observe.tracing import Tracer
from llm_datadist.observe.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_datadist.core.plan import Planner
    from llm_datadist.core.registry import Entry
    from llm_datadist.core.remote import Guard, RemoteRow
    from llm_datadist.core.segments import Segments
    from llm_datadist.engine.linker import Outcome, Target
    from llm_datadist.errors import LLMStatusCode
    from llm_datadist.options import Options


def make_engine(cluster_id: int, options: Options) -> Engine:
    """The engine that the options ask for.

    Raises as Engine, and LLMException(LLM_FEATURE_NOT_ENABLED) for `tracing` without its package.
    """
    if options.metrics or options.tracing:
        return ObservedEngine(cluster_id, options)
    return Engine(cluster_id, options)


class ObservedEngine(Engine):
    """Counts and traces what the options say."""

    def __init__(self, cluster_id: int, options: Options) -> None:
        recorder = Recorder() if options.metrics else None
        self._tracer = Tracer(cluster_id) if options.tracing else None
        super().__init__(cluster_id, options, recorder)

    def pull(self, source: RemoteRow, plan: Planner, dst: Entry) -> None:
        with self._watch("pull", source.cluster_id) as watch:
            super().pull(source, watch.timed(plan), dst)

    def push(self, target: RemoteRow, src: Guard, plan: Planner) -> None:
        with self._watch("push", target.cluster_id) as watch:
            super().push(target, src, watch.timed(plan))

    def push_to_addresses(self, cluster_id: int, src: Guard, segments: Segments) -> None:
        with self._watch("push", cluster_id) as watch:
            watch.moves(segments)
            super().push_to_addresses(cluster_id, src, segments)

    def transfer(self, send: Callable[[], Sequence[LLMStatusCode]]) -> Sequence[LLMStatusCode]:
        with self._watch("transfer") as watch:
            statuses = super().transfer(send)
            watch.ended(statuses)
            return statuses

    def copy(self, segments: Segments, src_space: str, dst_space: str) -> None:
        with self._watch("copy") as watch:
            watch.moves(segments)
            super().copy(segments, src_space, dst_space)

    def link(self, targets: Sequence[Target], timeout_s: float) -> list[Outcome]:
        with self._watch("link") as watch:
            outcomes = super().link(targets, timeout_s)
            watch.ended([outcome.status for outcome in outcomes])
            return outcomes

    def unlink(self, targets: Sequence[Target], timeout_s: float, *, force: bool) -> list[Outcome]:
        with self._watch("unlink") as watch:
            outcomes = super().unlink(targets, timeout_s, force=force)
            watch.ended([outcome.status for outcome in outcomes])
            return outcomes

    def _watch(self, operation: str, peer: int | None = None) -> Watch:
        path = "" if peer is None else self.links.paths.get(peer, "")
        recorder, tracer = self.recorder, self._tracer
        return Watch(
            None if recorder is None else recorder.series(operation, peer, path),
            None if tracer is None else tracer.start(operation, peer, path),
        )
