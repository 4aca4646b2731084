"""Which workers of one engine a worker of another reads from, and tells that it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from llm_datadist.integrations.vllm.handover import Source

if TYPE_CHECKING:
    from llm_datadist.endpoint import Endpoint

SourceT = TypeVar("SourceT", bound=Source)
SourceT_co = TypeVar("SourceT_co", bound=Source, covariant=True)

#: of one worker, and one hand-over: a client may name any number
MOST_PARTNERS = 64


@dataclass(frozen=True)
class Origin(Generic[SourceT_co]):
    """One worker of the engine that made a hand-over, by its number: by stage, and then by rank."""

    source: SourceT_co
    worker: int

    @property
    def endpoint(self) -> Endpoint:
        """Where it is dialled, as its source says. Raises LookupError as `Source.address`."""
        return self.source.address(self.worker)

    @property
    def cluster_id(self) -> int:
        """As who it is linked. Raises LookupError as `endpoint`."""
        return self.source.cluster_id(self.worker)

    @property
    def key(self) -> tuple[object, ...]:
        """What is equal of hand-overs that mean the same worker, whatever else they say."""
        return (*self.source.engine_key, self.worker)


def partners(rank: int, size: int, their_size: int) -> list[int]:
    """Of `their_size` tensor-parallel ranks, those that share a part of the model with ours.

    A rank's part is an interval of all heads; where there are fewer heads than ranks, those beside
    it have the same head, and it is an interval of that. Whatever the sizes: what we have is among
    theirs, and each of them is somebody's partner.
    """
    first = rank * their_size // size
    stop = -(-(rank + 1) * their_size // size)
    return list(range(first, stop))
