"""What a cluster says of itself at a moment: its links, pools, keys, and what it has counted.

The same values are what `LLMDataDist.stats` returns and what travels to whoever asks a cluster. The
bounds of the fields are for what comes from others: whoever shows it can calculate with it.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

#: upper bounds of a histogram's buckets in seconds; what took longer is in one more. Clusters tell
#: each other counts only, so these are part of the protocol
BOUNDS_S: Final = (*(float(f"{m}e{e}") for e in range(-6, 1) for m in (1, 2.5, 5)), 10.0)
_NUM_BUCKETS: Final = len(BOUNDS_S) + 1
#: so many links, pools, operations a cluster tells of at most, so that the answer is a small one
MAX_TOLD: Final = 256
_AT_MOST: Final = Meta(max_length=MAX_TOLD)
_MAX_REASON: Final = 500

#: a cluster's or a request's: 64 bits
Id: TypeAlias = Annotated[int, Meta(ge=0)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
#: a span of time; not NaN, and within what Python's types for dates and times can hold
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e12)]
Word: TypeAlias = Annotated[str, Meta(max_length=1024)]
Counts: TypeAlias = Annotated[
    tuple[Count, ...], Meta(min_length=_NUM_BUCKETS, max_length=_NUM_BUCKETS)
]


class Histogram(msgspec.Struct, frozen=True, array_like=True):
    """How long something took, how often: `counts[i]` times of at most `BOUNDS_S[i]` seconds."""

    counts: Counts = (0,) * _NUM_BUCKETS
    total_s: Seconds = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile_s(self, fraction: float) -> float | None:
        """The time that this fraction did not exceed, to within a bucket; None without any."""
        wanted = fraction * self.count
        if not wanted:
            return None
        reached = list(accumulate(self.counts))
        index = bisect_left(reached, wanted)
        low = BOUNDS_S[index - 1] if index else 0.0
        high = BOUNDS_S[min(index, len(BOUNDS_S) - 1)]
        return high - (high - low) * (reached[index] - wanted) / self.counts[index]

    def since(self, earlier: Histogram) -> Histogram:
        """What came on top of an earlier one; all, where the earlier one is of another life."""
        counts = tuple(n - m for n, m in zip(self.counts, earlier.counts, strict=True))
        if min(counts) < 0:
            return self
        return Histogram(counts, max(0.0, self.total_s - earlier.total_s))


class LinkStats(msgspec.Struct, frozen=True):
    """A link as it is now."""

    peer: Id  #: the peer's cluster id
    path: Word  #: how its bytes travel: "cma" or "tcp"
    state: Word  #: "linked", or "leaving" while it is being unlinked
    path_reason: Word = ""  #: why no better path is used
    endpoint: Word = ""  #: where we called the peer; empty when it called us
    num_running: Count = 0  #: transfers that run on it now


class PoolStats(msgspec.Struct, frozen=True):
    """One part of a memory pool, in bytes."""

    placement: Word  #: "HOST" or "DEVICE"
    part: Word
    capacity_nbytes: Count
    used_nbytes: Count
    largest_free_nbytes: Count  #: what a single allocation can have at most


class HeldKey(msgspec.Struct, frozen=True):
    """A key that holds memory of a pool until somebody pulls or removes it."""

    cache_id: Id
    age_s: Seconds  #: since the cache was allocated
    id: Id | None = None  #: the request's or the prefix's; not told to strangers
    model_id: Id | None = None
    is_prefix: bool = False


class OperationStats(msgspec.Struct, frozen=True):
    """What one kind of operation has done with one peer over one path."""

    operation: Word
    peer: Id | None  #: its cluster id; None where there is no one peer
    path: Word  #: empty where no link was used
    succeeded: Count
    failures: Annotated[tuple[tuple[Word, Count], ...], _AT_MOST]  #: by the name of the status
    nbytes: Count
    num_segments: Count
    duration: Histogram  #: of the whole, failures included
    lookup: Histogram  #: from the call on, until it was known where the bytes lie
    plan: Histogram  #: turning block lists into segments
    transfer: Histogram  #: moving the bytes, and telling the owner

    @property
    def num_failed(self) -> int:
        return sum(count for _, count in self.failures)


class WaitStats(msgspec.Struct, frozen=True):
    """How long threads waited for something other than bytes."""

    waited_for: Word  #: "stream" (a free connection to the peer) or "gate" (transfers on a link)
    duration: Histogram


class LinkEvents(msgspec.Struct, frozen=True):
    """How many links over a path there have been."""

    path: Word
    made: Count
    ended: Count


class MemberStats(msgspec.Struct, frozen=True):
    """A member of the fleet that a cluster follows, as that cluster sees it."""

    cluster_id: Id
    role: Word
    incarnation: Word  #: which start of it that is
    endpoint: Word  #: where it is announced; empty when it does not listen
    state: Word  #: "linked", "linking", "retries", "known", or "unfit"
    reason: Word = ""  #: why it is not linked


class FleetStats(msgspec.Struct, frozen=True):
    """The fleet that a cluster follows; what is counted is counted since `follow`."""

    directory: Word
    problem: Word  #: why the directory cannot be asked or told now
    is_announced: bool
    num_members: Count  #: without the cluster itself
    num_fitting: Count  #: that would be linked to
    num_linked: Count
    joined: Count
    left: Count
    changed: Count  #: roles, addresses, new starts
    links_made: Count  #: by following
    links_failed: Count
    members: Annotated[tuple[MemberStats, ...], _AT_MOST] = ()


class ClusterStats(msgspec.Struct, frozen=True):
    """A cluster at a moment. Immutable; what is counted is counted since `init`."""

    cluster_id: Id
    uptime_s: Seconds
    num_links: Count
    num_caches: Count
    num_keys: Count  #: of registered and allocated caches
    is_counting: bool  #: metrics are on; without them, the last three are empty
    oldest_key: HeldKey | None = None
    links: Annotated[tuple[LinkStats, ...], _AT_MOST] = ()
    pools: Annotated[tuple[PoolStats, ...], _AT_MOST] = ()
    operations: Annotated[tuple[OperationStats, ...], _AT_MOST] = ()
    waits: Annotated[tuple[WaitStats, ...], _AT_MOST] = ()
    link_events: Annotated[tuple[LinkEvents, ...], _AT_MOST] = ()
    num_silent: Count = 0  #: connections to us that have said nothing of use yet
    num_half_open: Count = 0  #: hand-shakes with callers that are not linked yet
    num_turned_away: Count = 0  #: connections that were neither a link's nor became one
    fleet: FleetStats | None = None  #: None while it follows none

    def told(self, *, to_stranger: bool) -> ClusterStats:
        """What others get to know: the first MAX_TOLD links, pools, and the busiest operations.

        Strangers get neither the addresses of peers, nor what explains a path, nor ids of keys.
        """
        links = [
            msgspec.structs.replace(
                link,
                endpoint="" if to_stranger else link.endpoint,
                path_reason="" if to_stranger else link.path_reason[:_MAX_REASON],
            )
            for link in self.links[:MAX_TOLD]
        ]
        key = self.oldest_key
        if key is not None and to_stranger:
            key = HeldKey(key.cache_id, key.age_s)
        fleet = self.fleet
        if fleet is not None:
            members = () if to_stranger else fleet.members[:MAX_TOLD]
            names = {"directory": "", "problem": ""} if to_stranger else {}
            fleet = msgspec.structs.replace(fleet, members=members, **names)
        busiest = sorted(self.operations, key=lambda each: each.nbytes, reverse=True)
        return msgspec.structs.replace(
            self,
            links=tuple(links),
            pools=self.pools[:MAX_TOLD],
            operations=tuple(busiest[:MAX_TOLD]),
            oldest_key=key,
            fleet=fleet,
        )
