"""memory.device: who is told of which memory, and the one space that there is so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.segments import Segments
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.memory.device import HOST
from llm_datadist.memory.process import ProcessMemory
from llm_datadist.owner.exposure import Exposure
from llm_datadist.running.movers import Movers

if TYPE_CHECKING:
    from llm_datadist.transport.base import Channel, Region, Streams

FAR = "far:0"
LAYOUT = Layout.at(Geometry(CacheKind.BLOCKS, 2, 4, 64), [1000, 9000])


class Fabric:
    """A transport of another package, which keeps book of what it was told."""

    name = "fabric"
    asks_owner = may_wait = False

    def __init__(self, *spaces: str, room: int = 9) -> None:
        self.reaches = frozenset(spaces)
        self.known: list[Region] = []
        self._room = room

    def offer(self) -> bytes | None:
        return None

    def open(self, offer: bytes, streams: Streams) -> Channel:
        raise NotImplementedError

    def expose(self, region: Region) -> None:
        if len(self.known) == self._room:
            raise LLMException("no room", LLMStatusCode.LLM_OUT_OF_MEMORY)
        self.known.append(region)

    def conceal(self, region: Region) -> None:
        self.known.remove(region)

    def exports(self) -> bytes:
        return b""

    def close(self) -> None:
        pass


def test_a_transport_is_told_of_the_memory_that_it_reaches() -> None:
    near, both = Fabric(HOST), Fabric(HOST, FAR)
    exposure = Exposure([near, both])
    for cache_id, space in enumerate((HOST, FAR)):
        region = exposure.expose(LAYOUT, space, is_remote_accessible=True)
        exposure.file(cache_id, region)
    assert [region.space for region in near.known] == [HOST]
    assert [region.space for region in both.known] == [HOST, FAR]
    assert near.known[0].addrs == (1000, 9000)
    assert near.known[0].nbytes == 4 * 64
    exposure.conceal(1)
    assert [region.space for region in both.known] == [HOST]
    exposure.conceal(0)
    assert near.known == both.known == []


def test_memory_that_one_transport_cannot_take_is_known_to_none() -> None:
    first, full = Fabric(HOST), Fabric(HOST, room=0)
    with pytest.raises(LLMException, match="no room"):
        Exposure([first, full]).expose(LAYOUT, HOST, is_remote_accessible=True)
    assert first.known == []


def test_process_memory_is_reserved_copied_and_opened_by_its_address() -> None:
    host = ProcessMemory(Movers(1))
    memory = host.reserve(8192)
    src, dst = (memory.view(memory.addr + at, 4096) for at in (0, 4096))
    src[:] = np.arange(4096, dtype=np.uint64).astype(np.uint8)
    host.copy(Segments.few([memory.addr], [memory.addr + 4096], [4096]))
    np.testing.assert_array_equal(dst, src)
    assert host.open(host.export(memory.addr, 4096)) == memory.addr
    memory.close()
