"""What running clusters say: asked at a moment, and shown as two tables.

Two such moments say what went on between them: rates and latencies.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from llm_datadist.errors import LLMException
from llm_datadist.peer.asking import ask_stats

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from llm_datadist.core.stats import ClusterStats, LinkStats, OperationStats, PoolStats
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.link_security import LinkSecurity

_NONE = "-"
#: what went on in less is no rate: of a cluster that has just started, or of one that lies
_LEAST_SPAN_S = 1e-3
_GIB = 2**30


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

    def ask(endpoint: Endpoint) -> Sample:
        try:
            return Sample(endpoint, ask_stats(endpoint, security, timeout_s))
        except LLMException as error:
            return Sample(endpoint, None, str(error))

    with ThreadPoolExecutor(len(endpoints)) as threads:
        return list(threads.map(ask, endpoints))


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


def view(samples: Sequence[Sample], before: Mapping[Endpoint, ClusterStats]) -> Group:
    """Rates and latencies since `before`, or since init for clusters that are not in it."""
    return Group(_clusters(samples), _traffic(samples, before))


def _clusters(samples: Iterable[Sample]) -> Table:
    table = Table(title="clusters", title_justify="left")
    for name in ("address", "cluster", "up", "links", "running", "caches", "keys", "oldest key"):
        table.add_column(name, justify="left" if name in ("address", "links") else "right")
    table.add_column("pools")
    table.add_column("remarks", overflow="fold")
    for sample in samples:
        if sample.stats is None:
            cells = [*[_NONE] * 8, sample.problem]
        else:
            cells = _cluster_cells(sample.stats)
        table.add_row(str(sample.endpoint), *map(_plain, cells))
    return table


def _cluster_cells(stats: ClusterStats) -> list[str]:
    paths = Counter(link.path for link in stats.links)
    linked = ", ".join(f"{count} {path}" for path, count in sorted(paths.items()))
    key = stats.oldest_key
    return [
        str(stats.cluster_id),
        _age(stats.uptime_s),
        (linked or _NONE) if stats.num_links == len(stats.links) else f"{stats.num_links}",
        str(sum(link.num_running for link in stats.links)),
        str(stats.num_caches),
        str(stats.num_keys),
        _NONE if key is None else _age(key.age_s),
        "\n".join(map(_pool, stats.pools)) or _NONE,
        "\n".join(_remarks(stats)),
    ]


def _remarks(stats: ClusterStats) -> Iterable[str]:
    if not stats.is_counting:
        yield "metrics are off: LLM_DATADIST_METRICS=1"
    if stats.num_silent:
        yield f"silent connections: {stats.num_silent}"
    if stats.num_half_open:
        yield f"half-open hand-shakes: {stats.num_half_open}"


def _pool(pool: PoolStats) -> str:
    used = pool.used_nbytes / pool.capacity_nbytes if pool.capacity_nbytes else 0.0
    return f"{pool.placement} {pool.part}: {used:.0%} of {pool.capacity_nbytes / _GIB:.2f} GiB"


def _traffic(samples: Iterable[Sample], before: Mapping[Endpoint, ClusterStats]) -> Table:
    table = Table(title="links and operations", title_justify="left")
    for name in ("cluster", "peer", "path", "state", "operation"):
        table.add_column(name)
    for name in ("GB/s", "per s", "p50 ms", "p99 ms", "GiB moved", "failed"):
        table.add_column(name, justify="right")
    for sample in samples:
        if sample.stats is not None:
            for row in _rows(sample.stats, before.get(sample.endpoint)):
                table.add_row(str(sample.stats.cluster_id), *map(_plain, row))
    return table


def _rows(stats: ClusterStats, before: ClusterStats | None) -> Iterable[list[str]]:
    """Links that live with what is done on them, then what is done without one."""
    rest = activities(stats, before)
    for link in stats.links:
        ours = [each for each in rest if _is_on(each, link)]
        rest = [each for each in rest if each not in ours]
        head = [str(link.peer), link.path, link.state]
        yield from ([*head, *_cells(each)] for each in ours)
        if not ours:
            yield [*head, *[_NONE] * 7]
    for each in rest:
        peer = each.operation.peer
        yield [_NONE if peer is None else str(peer), each.operation.path, "", *_cells(each)]


def _is_on(activity: Activity, link: LinkStats) -> bool:
    return (activity.operation.peer, activity.operation.path) == (link.peer, link.path)


def _cells(activity: Activity) -> list[str]:
    operation = activity.operation
    return [
        operation.operation,
        f"{activity.nbytes_per_s / 1e9:.3f}",
        f"{activity.per_s:.1f}",
        _ms(activity.p50_s),
        _ms(activity.p99_s),
        f"{operation.nbytes / _GIB:.3f}",
        str(operation.num_failed),
    ]


def _plain(cell: str) -> Text:
    """Words of others on our terminal: no markup, no escape sequences."""
    return Text(
        "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in cell)
    )


def _ms(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{seconds * 1e3:.3g}"


def _age(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
