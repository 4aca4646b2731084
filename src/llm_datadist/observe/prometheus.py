"""Prometheus: a cluster's stats as metrics. Needs the extra `metrics`."""

from __future__ import annotations

from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector as _Collector

from llm_datadist.core.stats import BOUNDS_S

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from threading import Thread
    from wsgiref.simple_server import WSGIServer

    from prometheus_client.core import Metric

    from llm_datadist.core.stats import ClusterStats, Histogram

_PREFIX = "llm_datadist_"
#: a connection that says nothing, or takes nothing, for so long is closed
_REQUEST_S = 5.0
_BY_OPERATION = ("cluster", "operation", "peer", "path")


class HasStats(Protocol):
    """An LLMDataDist."""

    def stats(self) -> ClusterStats: ...


class Collector(_Collector):
    """Makes metrics of `datadist.stats()` at each scrape; to be registered with a registry.

    A cluster that is not initialised has `llm_datadist_up` 0 and nothing else. Thread-safe.
    """

    def __init__(self, datadist: HasStats) -> None:
        self._datadist = datadist

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(_PREFIX + "up", "Whether the cluster is initialised.")
        try:
            stats = self._datadist.stats()
        except RuntimeError:  # which says just that
            up.add_metric((), 0)
            yield up
            return
        up.add_metric((), 1)
        yield up
        yield from _state(stats)
        if stats.is_counting:
            yield from _counted(stats)


def serve(datadist: HasStats, port: int, addr: str = "127.0.0.1") -> tuple[WSGIServer, Thread]:
    """Serves the cluster's metrics, and no others, at http://addr:port/metrics.

    Returns what `prometheus_client.start_http_server` does: `server.shutdown()` and
    `server.server_close()` end it. Raises OSError when the address cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(Collector(datadist))
    server, thread = start_http_server(port, addr, registry)
    server.RequestHandlerClass = _Bounded
    return server, thread


class _Bounded(WSGIRequestHandler):
    """Each connection has a thread of its own, and so is not waited for."""

    timeout = _REQUEST_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (its name there)
        """Nothing, as everywhere in the client."""

    def handle(self) -> None:
        with suppress(TimeoutError):
            super().handle()


def _state(stats: ClusterStats) -> Iterator[Metric]:
    cluster = str(stats.cluster_id)
    links = _gauge("links", "Live links, by path and state.", "cluster", "path", "state")
    for path, state in sorted({(link.path, link.state) for link in stats.links}):
        number = sum((link.path, link.state) == (path, state) for link in stats.links)
        links.add_metric((cluster, path, state), number)
    yield links
    unlinked = _gauge("unlinked_connections", "Connections of no link.", "cluster", "kind")
    unlinked.add_metric((cluster, "silent"), stats.num_silent)
    unlinked.add_metric((cluster, "half-open"), stats.num_half_open)
    yield unlinked
    away = _counter("turned_away", "Connections that were no link's.", "cluster")
    away.add_metric((cluster,), stats.num_turned_away)
    yield away
    running = _gauge("transfers_running", "Transfers on links, right now.", "cluster")
    running.add_metric((cluster,), sum(link.num_running for link in stats.links))
    yield running
    caches = _gauge("caches", "Registered and allocated caches.", "cluster")
    caches.add_metric((cluster,), stats.num_caches)
    yield caches
    keys = _gauge("keys", "Keys of registered and allocated caches.", "cluster")
    keys.add_metric((cluster,), stats.num_keys)
    yield keys
    oldest = _gauge(
        "oldest_key_age_seconds", "Age of the oldest key that still holds pool memory.", "cluster"
    )
    oldest.add_metric((cluster,), stats.oldest_key.age_s if stats.oldest_key else 0)
    yield oldest
    yield from _fleet(stats, cluster)
    yield from _pools(stats, cluster)


def _fleet(stats: ClusterStats, cluster: str) -> Iterator[Metric]:
    members = _gauge("fleet_members", "Members of the followed fleet.", "cluster", "which")
    events = _counter("fleet_events", "What happened in it.", "cluster", "event")
    silent = _gauge("fleet_silent", "Whether its directory does not answer.", "cluster")
    fleet = stats.fleet
    if fleet is not None:
        for which in ("members", "fitting", "linked"):
            members.add_metric((cluster, which), getattr(fleet, f"num_{which}"))
        for event in ("joined", "left", "changed", "links_made", "links_failed"):
            events.add_metric((cluster, event), getattr(fleet, event))
        silent.add_metric((cluster,), bool(fleet.problem))
    yield from (members, events, silent)


def _pools(stats: ClusterStats, cluster: str) -> Iterator[Metric]:
    names = ("cluster", "placement", "part")
    capacity = _gauge("pool_capacity_bytes", "Size of a pool's part.", *names)
    used = _gauge("pool_used_bytes", "Handed out of it.", *names)
    largest = _gauge("pool_largest_free_bytes", "What one allocation can have.", *names)
    for pool in stats.pools:
        labels = (cluster, pool.placement, pool.part)
        capacity.add_metric(labels, pool.capacity_nbytes)
        used.add_metric(labels, pool.used_nbytes)
        largest.add_metric(labels, pool.largest_free_nbytes)
    yield from (capacity, used, largest)


def _counted(stats: ClusterStats) -> Iterator[Metric]:
    cluster = str(stats.cluster_id)
    yield from _operations(stats, cluster)
    waits = _histogram("wait_seconds", "Waits for a stream or a gate.", "cluster", "waited_for")
    for wait in stats.waits:
        _add(waits, (cluster, wait.waited_for), wait.duration)
    yield waits
    made = _counter("links_made", "Links that were made.", "cluster", "path")
    ended = _counter("links_ended", "Links that ended.", "cluster", "path")
    for each in stats.link_events:
        made.add_metric((cluster, each.path), each.made)
        ended.add_metric((cluster, each.path), each.ended)
    yield from (made, ended)


def _operations(stats: ClusterStats, cluster: str) -> Iterator[Metric]:
    names = _BY_OPERATION
    ends = _counter("operations", "Operations that ended, by status.", *names, "status")
    nbytes = _counter("bytes", "Bytes that operations moved.", *names)
    segments = _counter("segments", "Contiguous ranges that they moved.", *names)
    durations = _histogram("operation_seconds", "How long operations took.", *names)
    phases = _histogram("phase_seconds", "How long their phases took.", *names, "phase")
    for each in stats.operations:
        peer = "" if each.peer is None else str(each.peer)
        labels = (cluster, each.operation, peer, each.path)
        ends.add_metric((*labels, "LLM_SUCCESS"), each.succeeded)
        for status, count in each.failures:
            ends.add_metric((*labels, status), count)
        nbytes.add_metric(labels, each.nbytes)
        segments.add_metric(labels, each.num_segments)
        _add(durations, labels, each.duration)
        for phase in ("lookup", "plan", "transfer"):
            times: Histogram = getattr(each, phase)
            if times.count:
                _add(phases, (*labels, phase), times)
    yield from (ends, nbytes, segments, durations, phases)


def _gauge(name: str, doc: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(_PREFIX + name, doc, labels=labels)


def _counter(name: str, doc: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(_PREFIX + name, doc, labels=labels)


def _histogram(name: str, doc: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(_PREFIX + name, doc, labels=labels)


def _add(family: HistogramMetricFamily, labels: Sequence[str], times: Histogram) -> None:
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    reached = accumulate(times.counts)
    family.add_metric(labels, list(zip(bounds, reached, strict=True)), times.total_s)
