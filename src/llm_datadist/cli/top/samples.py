"""What running clusters say, asked at a moment. Two moments say what went on: rates, latencies."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException
from llm_datadist.peer.asking import ask_stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.stats import ClusterStats, OperationStats
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.link_security import LinkSecurity

#: what went on in less is no rate: of a cluster that has just started, or of one that lies
_LEAST_SPAN_S = 1e-3


@dataclass(frozen=True)
class Sample:
    """One cluster's answer, or why there is none."""

    endpoint: Endpoint
    stats: ClusterStats | None
    problem: str = ""


@dataclass(frozen=True)
class Activity:
    """What one kind of operation did in a span of time."""

    operation: OperationStats
    nbytes_per_s: float
    per_s: float
    p50_s: float | None
    p99_s: float | None


def take_samples(
    endpoints: Sequence[Endpoint], security: LinkSecurity | None, timeout_s: float
) -> list[Sample]:
    """Asks all clusters at once; each has `timeout_s`."""

    found: list[Sample | None] = [None] * len(endpoints)

    def ask(index: int) -> None:
        endpoint = endpoints[index]
        try:
            found[index] = Sample(endpoint, ask_stats(endpoint, security, timeout_s))
        except LLMException as error:
            found[index] = Sample(endpoint, None, str(error))
        except Exception as error:  # a thread's end; the other clusters are worth seeing
            found[index] = Sample(endpoint, None, f"{type(error).__name__}: {error}")

    # daemons: who quits waits for no answer
    threads = [Thread(target=ask, args=(index,), daemon=True) for index in range(len(endpoints))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [sample for sample in found if sample is not None]


def activities(stats: ClusterStats, before: ClusterStats | None) -> list[Activity]:
    """What was done since `before`, or since the cluster was initialised."""
    if before is None or before.uptime_s >= stats.uptime_s:  # another process listens there now
        return [_activity(each, None, stats.uptime_s) for each in stats.operations]
    span_s = stats.uptime_s - before.uptime_s
    earlier = {(each.operation, each.peer, each.path): each for each in before.operations}
    return [
        _activity(each, earlier.get((each.operation, each.peer, each.path)), span_s)
        for each in stats.operations
    ]


def _activity(now: OperationStats, before: OperationStats | None, span_s: float) -> Activity:
    duration, nbytes, ended = now.duration, now.nbytes, now.succeeded + now.num_failed
    if before is not None:
        duration = duration.since(before.duration)
        nbytes = max(0, nbytes - before.nbytes)
        ended = max(0, ended - before.succeeded - before.num_failed)
    span_s = max(span_s, _LEAST_SPAN_S)
    return Activity(
        now, nbytes / span_s, ended / span_s, duration.quantile_s(0.5), duration.quantile_s(0.99)
    )
