"""The snapshot: what an engine says of itself now. Cheap: it reads what is there anyway."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llm_datadist.core.stats import ClusterStats, LinkStats, PoolStats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.engine.catalog import Catalog
    from llm_datadist.engine.context import Context
    from llm_datadist.engine.session import Session


def snapshot(context: Context) -> ClusterStats:
    """In any thread."""
    links = [_link(session) for session in context.links.all()]
    recorder, holdings = context.recorder, context.catalog.holdings()
    return ClusterStats(
        cluster_id=context.me.cluster_id,
        uptime_s=time.monotonic() - context.started_at,
        num_links=len(links),
        num_caches=holdings.num_caches,
        num_keys=holdings.num_keys,
        is_counting=recorder is not None,
        oldest_key=holdings.oldest_key,
        links=tuple(links),
        pools=tuple(_pools(context.catalog)),
        operations=() if recorder is None else recorder.operations(),
        waits=() if recorder is None else recorder.waits(),
        link_events=() if recorder is None else recorder.link_events(),
    )


def _link(session: Session) -> LinkStats:
    return LinkStats(
        session.cluster_id,
        session.path,
        session.state,
        session.path_reason,
        str(session.endpoint or ""),
        session.gate.num_inside,
    )


def _pools(catalog: Catalog) -> Iterator[PoolStats]:
    for placement, usages in catalog.usage().items():
        for usage in usages:
            yield PoolStats(
                placement.name,
                usage.name,
                usage.capacity_nbytes,
                usage.used_nbytes,
                usage.largest_free_nbytes,
            )
