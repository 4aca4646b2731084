"""Shards: one cache of ours out of several peers', each of which has some heads or layers of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llm_datadist.core.reshard import reshard
from llm_datadist.core.transfer import PullBlocks
from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.geometry import Layout
    from llm_datadist.core.pattern import Pattern
    from llm_datadist.core.registry import Entry
    from llm_datadist.core.remote import RemoteCache
    from llm_datadist.core.segments import Segments


@dataclass(frozen=True, slots=True)
class PullShard(PullBlocks):
    """What one of several sources has of it: a part of `PullShards`."""

    verb = "pull_shards"
    is_all = False
    #: made of the layouts of all sources
    patterns: Sequence[Pattern] = ()

    def _patterns(self, remote: RemoteCache, ours: Entry) -> Sequence[Pattern]:
        for pattern in self.patterns:
            if pattern.src != remote.kv_layout or pattern.dst != ours.kv_layout:
                raise invalid("a cache was registered anew, with another layout, in the middle")
        return self.patterns

    def _plan(self, src: Layout, src_row: int, dst: Layout) -> Segments:
        raise invalid("a cache was registered anew, without a layout, in the middle")


@dataclass(frozen=True, slots=True)
class PullShards:
    """Several peers' caches, each with a part of it, into blocks of one of ours."""

    cache_id: int  #: ours
    shards: Sequence[PullShard]

    def __str__(self) -> str:
        keys = ", ".join(str(shard.key) for shard in self.shards)
        return f"pull_shards of {keys} into cache {self.cache_id}"

    def planned(self, found: Sequence[RemoteCache], ours: Entry) -> list[PullShard]:
        """The shards, each with what is to be read of it. Raises LLM_PARAM_INVALID."""
        layouts = [cache.kv_layout for cache in found if cache.kv_layout is not None]
        if len(layouts) < len(found) or ours.kv_layout is None:
            raise invalid("a cache has no layout: both ends must register theirs with one")
        patterns = reshard(layouts, ours.kv_layout)
        return [
            replace(shard, patterns=tuple(p for p in patterns if p.source == index))
            for index, shard in enumerate(self.shards)
        ]
