"""What running clusters said, as two tables and the remarks between them."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from rich.console import Group
from rich.text import Text

from llm_datadist.cli.top.order import Order
from llm_datadist.cli.top.samples import Activity, activities
from llm_datadist.cli.top.table import Column, FittedTable, Row, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from llm_datadist.cli.top.samples import Sample
    from llm_datadist.core.stats import ClusterStats, FleetStats, LinkStats, PoolStats
    from llm_datadist.endpoint import Endpoint

_NONE = "-"
_GIB = 2**30
_CLUSTERS = (
    Column("address", 0, is_number=False), Column("cluster", 1), Column("up", 6),
    Column("links", 2, is_number=False), Column("running", 5), Column("caches", 7),
    Column("keys", 4), Column("oldest key", 3), Column("pool", 3),
    Column("pools", 8, is_number=False),
)  # fmt: skip
_TRAFFIC = (
    Column("cluster", 4), Column("peer", 1), Column("path", 5, is_number=False),
    Column("state", 9, is_number=False), Column("operation", 0, is_number=False),
    Column("GB/s", 0), Column("per s", 6), Column("p50 ms", 7), Column("p99 ms", 3),
    Column("GiB moved", 8), Column("failed", 2),
)  # fmt: skip
_FAILED = "red"
_IDLE = "dim"


class Traffic(NamedTuple):
    """A link, what is done on it, or both: one row."""

    cluster_id: int
    peer: int | None
    path: str
    state: str
    activity: Activity | None


_Key: TypeAlias = "tuple[float, ...]"
#: ascending; of two that are equal, what moved more comes first
_KEYS: dict[Order, Callable[[Activity], float]] = {
    Order.SPEED: lambda each: -each.nbytes_per_s,
    Order.RATE: lambda each: -each.per_s,
    Order.LATENCY: lambda each: -(each.p99_s or 0.0),
    Order.FAILED: lambda each: -each.operation.num_failed,
}


def view(
    samples: Sequence[Sample],
    before: Mapping[Endpoint, ClusterStats],
    order: Order = Order.SPEED,
    *,
    is_reversed: bool = False,
) -> Group:
    """Rates and latencies since `before`, or since init for clusters that are not in it."""
    return Group(
        _clusters(samples), *_remarks(samples), "", _traffic(samples, before, order, is_reversed)
    )


def _clusters(samples: Iterable[Sample]) -> FittedTable:
    rows = [
        Row([str(sample.endpoint), *[_NONE] * 9], _FAILED)
        if sample.stats is None
        else Row([str(sample.endpoint), *_cluster_cells(sample.stats)])
        for sample in samples
    ]
    return FittedTable("clusters", _CLUSTERS, rows)


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
        f"{max(map(_used, stats.pools)):.0%}" if stats.pools else _NONE,
        ", ".join(map(_pool, stats.pools)) or _NONE,
    ]


def _pool(pool: PoolStats) -> str:
    capacity = f"{pool.capacity_nbytes / _GIB:.2f} GiB"
    return f"{pool.placement} {pool.part}: {_used(pool):.0%} of {capacity}"


def _used(pool: PoolStats) -> float:
    return pool.used_nbytes / pool.capacity_nbytes if pool.capacity_nbytes else 0.0


def _remarks(samples: Iterable[Sample]) -> Iterable[Text]:
    """What is wrong, whole, and why figures are missing."""
    silent = []
    for sample in samples:
        if sample.stats is None:
            problem = plain(sample.problem)
            named = str(sample.endpoint) in sample.problem
            yield Text.assemble("" if named else f"{sample.endpoint}: ", problem, style=_FAILED)
            continue
        if not sample.stats.is_counting:
            silent.append(str(sample.endpoint))
        if strangers := sample.stats.num_silent + sample.stats.num_half_open:
            yield Text(f"{sample.endpoint}: {strangers} connections that are no link's", _IDLE)
        if (fleet := sample.stats.fleet) is not None:
            yield _fleet(sample.endpoint, fleet)
    if silent:
        yield Text(f"metrics are off (LLM_DATADIST_METRICS=1): {', '.join(silent)}", _IDLE)


def _fleet(endpoint: Endpoint, fleet: FleetStats) -> Text:
    seen = f"{fleet.num_linked} of {fleet.num_fitting} members that fit are linked"
    text = f"{endpoint}: its fleet has {fleet.num_members} others; {seen}"
    if fleet.problem:
        return Text(f"{text}; its directory: ", _FAILED).append_text(plain(fleet.problem))
    if not fleet.is_announced:
        return Text(f"{text}; it is not announced itself", _FAILED)
    return Text(text, _IDLE)


def _traffic(
    samples: Iterable[Sample],
    before: Mapping[Endpoint, ClusterStats],
    order: Order,
    is_reversed: bool,
) -> FittedTable:
    found = [
        each
        for sample in samples
        if sample.stats is not None
        for each in _found(sample.stats, before.get(sample.endpoint))
    ]
    found.sort(key=lambda each: _place(each, order), reverse=is_reversed)
    found.sort(key=lambda each: each.activity is None)  # whose links are idle comes last
    title = f"links and operations, by {order.value}{', reversed' if is_reversed else ''}"
    return FittedTable(title, _TRAFFIC, [_row(each) for each in found])


def _place(traffic: Traffic, order: Order) -> _Key:
    ids = (traffic.cluster_id, -1 if traffic.peer is None else traffic.peer)
    if order is Order.PEER or traffic.activity is None:
        return ids
    return (_KEYS[order](traffic.activity), -traffic.activity.operation.nbytes, *ids)


def _found(stats: ClusterStats, before: ClusterStats | None) -> Iterable[Traffic]:
    """Links that live with what is done on them, and what is done without one."""
    rest = activities(stats, before)
    for link in stats.links:
        ours = [each for each in rest if _is_on(each, link)]
        rest = [each for each in rest if each not in ours]
        for each in ours or (None,):
            yield Traffic(stats.cluster_id, link.peer, link.path, link.state, each)
    for each in rest:
        yield Traffic(stats.cluster_id, each.operation.peer, each.operation.path, "", each)


def _is_on(activity: Activity, link: LinkStats) -> bool:
    return (activity.operation.peer, activity.operation.path) == (link.peer, link.path)


def _row(traffic: Traffic) -> Row:
    peer = _NONE if traffic.peer is None else str(traffic.peer)
    head = [str(traffic.cluster_id), peer, traffic.path or _NONE, traffic.state or _NONE]
    activity = traffic.activity
    if activity is None:
        return Row([*head, *[_NONE] * 7], _IDLE)
    operation = activity.operation
    cells = [
        operation.operation,
        f"{activity.nbytes_per_s / 1e9:.3f}",
        f"{activity.per_s:.1f}",
        _ms(activity.p50_s),
        _ms(activity.p99_s),
        f"{operation.nbytes / _GIB:.3f}",
        str(operation.num_failed),
    ]
    return Row([*head, *cells], _FAILED if operation.num_failed else "")


def _ms(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{seconds * 1e3:.3g}"


def _age(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
