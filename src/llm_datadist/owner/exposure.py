"""What the transports know of this process's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.observe.log import get_logger
from llm_datadist.transport.base import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.geometry import Layout
    from llm_datadist.transport.base import Transport


class Exposure:
    """Tells transports of memory in their reach as it comes and goes.

    Thread-safe but for `file` and `conceal`, which the catalog's lock guards.
    """

    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = transports
        #: by cache id
        self._regions: dict[int, Region] = {}

    def expose(self, layout: Layout, space: str, *, is_remote_accessible: bool) -> Region:
        """A cache's memory, to all transports that reach it; or to none, and LLMException."""
        addrs = tuple(layout.addrs.tolist())
        region = Region(addrs, layout.geometry.tensor_nbytes, is_remote_accessible, space)
        self._tell(region)
        return region

    def expose_words(self, addr: int, nbytes: int) -> None:
        """Generation words, which stay for good."""
        self._tell(Region((addr,), nbytes, is_remote_accessible=True))

    def file(self, cache_id: int, region: Region) -> None:
        """The region is that of this cache."""
        self._regions[cache_id] = region

    def conceal(self, cache_id: int) -> None:
        region = self._regions.pop(cache_id, None)
        if region is not None:
            self.conceal_region(region)

    def conceal_region(self, region: Region) -> None:
        for transport in self._in_reach(region.space):
            _conceal(transport, region)

    def _tell(self, region: Region) -> None:
        told: list[Transport] = []
        try:
            for transport in self._in_reach(region.space):
                transport.expose(region)
                told.append(transport)
        except BaseException:
            for transport in told:
                _conceal(transport, region)
            raise

    def _in_reach(self, space: str) -> list[Transport]:
        return [transport for transport in self._transports if space in transport.reaches]


def _conceal(transport: Transport, region: Region) -> None:
    """What a transport keeps of memory that is gone must not keep the memory from its pool."""
    try:
        transport.conceal(region)
    except Exception:
        get_logger().exception("the transport %s did not let go of memory", transport.name)
