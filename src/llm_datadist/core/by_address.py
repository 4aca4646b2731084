"""A transfer by address: pieces of memory at both ends, each within a cache of its process."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm_datadist.core.ranges import NOWHERE, Ids, Ranges
from llm_datadist.core.segments import Segments
from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from llm_datadist.core.segments import U64


class Part(NamedTuple):
    """What lies in one cache of ours and in one of the peer's."""

    our_id: int
    their_id: int
    segments: Segments


@dataclass(frozen=True, slots=True, eq=False)
class ByAddress:
    """`nbytes[i]` at address `ours[i]` here and `theirs[i]` there; `our_ids[i]` is our cache."""

    is_write: bool  #: to the peer; else from it
    ours: U64
    theirs: U64
    nbytes: U64
    our_ids: Ids

    @classmethod
    def of(
        cls, *, is_write: bool, ours: U64, theirs: U64, nbytes: U64, memory: Ranges
    ) -> ByAddress:
        """Pieces of our memory; those of no bytes are left out.

        Raises LLMException(LLM_PARAM_INVALID) for one that is not in it.
        """
        is_something = nbytes > 0
        if not is_something.all():
            ours, theirs, nbytes = ours[is_something], theirs[is_something], nbytes[is_something]
        our_ids = memory.find(ours, nbytes)
        _require_found(our_ids, ours, nbytes, "our")
        return cls(is_write, ours, theirs, nbytes, our_ids)

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def whole(self) -> Segments:
        """All of it, wherever it lies."""
        src, dst = (self.ours, self.theirs) if self.is_write else (self.theirs, self.ours)
        return Segments(src, dst, self.nbytes)

    def parts(self, memory: Ranges) -> list[Part]:
        """The same by caches at both ends, in order within each; `memory` is the peer's.

        Raises LLMException(LLM_PARAM_INVALID) for a piece that is not in it.
        """
        if not len(self):
            return []
        their_ids = memory.find(self.theirs, self.nbytes)
        _require_found(their_ids, self.theirs, self.nbytes, "the peer's")
        order = np.lexsort((their_ids, self.our_ids))
        our_ids, their_ids = self.our_ids[order], their_ids[order]
        changes = (our_ids[1:] != our_ids[:-1]) | (their_ids[1:] != their_ids[:-1])
        first = np.flatnonzero(np.concatenate(([True], changes)))
        bounds = [*first.tolist(), len(order)]
        return [
            Part(int(our_ids[start]), int(their_ids[start]), self._segments(order[start:stop]))
            for start, stop in itertools.pairwise(bounds)
        ]

    def _segments(self, which: Ids) -> Segments:
        ours, theirs = self.ours[which], self.theirs[which]
        src, dst = (ours, theirs) if self.is_write else (theirs, ours)
        return Segments(src, dst, self.nbytes[which]).coalesced()


def _require_found(ids: Ids, addrs: U64, nbytes: U64, whose: str) -> None:
    if len(ids) and ids.min() == NOWHERE:
        index = int(np.argmin(ids))
        addr, length = int(addrs[index]), int(nbytes[index])
        raise invalid(
            f"{length} bytes at {whose} address {addr:#x} are in no memory that is registered "
            "there: register it whole (register_mem), and not local_only for peers to reach it"
        )
