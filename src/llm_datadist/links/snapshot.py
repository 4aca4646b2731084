"""The snapshot: what a cluster says of itself now. Cheap: it reads what is there anyway."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llm_datadist.core.stats import MAX_TOLD, ClusterStats, LinkStats, PoolStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llm_datadist.core.stats import FleetStats
    from llm_datadist.links.session import Session
    from llm_datadist.links.strangers import Strangers
    from llm_datadist.links.table import LinkTable
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.owner.catalog import Catalog


class Snapshots:
    """Makes snapshots of one cluster, in any thread."""

    def __init__(
        self,
        cluster_id: int,
        links: LinkTable,
        catalog: Catalog,
        strangers: Strangers,
        recorder: Recorder | None,
    ) -> None:
        self._cluster_id = cluster_id
        self._links = links
        self._catalog = catalog
        self._strangers = strangers
        self._recorder = recorder
        self._started_at = time.monotonic()
        #: what is followed, if anything is, with so many of its members
        self.take_fleet: Callable[[int | None], FleetStats | None] = lambda _: None

    def take_for_others(self) -> ClusterStats:
        """As `take`, of which they are told no more: strangers may ask often."""
        return self.take(MAX_TOLD)

    def take(self, most_members: int | None = None) -> ClusterStats:
        """What there is, and what was counted so far."""
        links = [_link(session) for session in self._links.all()]
        recorder, holdings = self._recorder, self._catalog.holdings()
        return ClusterStats(
            cluster_id=self._cluster_id,
            uptime_s=time.monotonic() - self._started_at,
            num_links=len(links),
            num_caches=holdings.num_caches,
            num_keys=holdings.num_keys,
            is_counting=recorder is not None,
            oldest_key=holdings.oldest_key,
            links=tuple(links),
            pools=tuple(_pools(self._catalog)),
            operations=() if recorder is None else recorder.operations(),
            waits=() if recorder is None else recorder.waits(),
            link_events=() if recorder is None else recorder.link_events(),
            num_silent=self._strangers.num_silent,
            num_half_open=self._strangers.num_half_open,
            num_turned_away=self._strangers.num_turned_away,
            fleet=self.take_fleet(most_members),
        )


def _link(session: Session) -> LinkStats:
    return LinkStats(
        session.cluster_id,
        session.path,
        session.state,
        session.path_reason,
        str(session.endpoint or ""),
        session.num_running,
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
