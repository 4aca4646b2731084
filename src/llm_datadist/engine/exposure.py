"""What the transports know of this process's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.memory.device import HOST
from llm_datadist.transport.base import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.geometry import Layout
    from llm_datadist.transport.base import Transport


class Exposure:
    """Tells transports of memory in their reach as it comes and goes. Under the catalog's lock."""

    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = transports
        #: by cache id
        self._regions: dict[int, Region] = {}

    def expose(self, layout: Layout, space: str, *, is_remote_accessible: bool) -> Region:
        """A cache's memory, to all transports that reach it; or to none, and LLMException."""
        addrs = tuple(layout.addrs.tolist())
        region = Region(addrs, layout.geometry.tensor_nbytes, is_remote_accessible, space)
        told: list[Transport] = []
        try:
            for transport in self._in_reach(space):
                transport.expose(region)
                told.append(transport)
        except BaseException:
            for transport in told:
                transport.conceal(region)
            raise
        return region

    def expose_words(self, addr: int, nbytes: int) -> None:
        """Generation words, which stay for good."""
        for transport in self._in_reach(HOST):
            transport.expose(Region((addr,), nbytes, is_remote_accessible=True))

    def file(self, cache_id: int, region: Region) -> None:
        """The region is that of this cache."""
        self._regions[cache_id] = region

    def conceal(self, cache_id: int) -> None:
        self.conceal_region(self._regions.pop(cache_id))

    def conceal_region(self, region: Region) -> None:
        for transport in self._in_reach(region.space):
            transport.conceal(region)

    def _in_reach(self, space: str) -> list[Transport]:
        return [transport for transport in self._transports if space in transport.reaches]
