"""The process's own memory, as a Device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.memory.arena import Arena
from llm_datadist.memory.device import HOST
from llm_datadist.memory.local import copy

if TYPE_CHECKING:
    from llm_datadist.core.segments import Segments
    from llm_datadist.memory.device import Reservation
    from llm_datadist.running.movers import Movers


class ProcessMemory:
    """Memory that the kernel can copy from one process to another: its address is all it takes."""

    space = HOST

    def __init__(self, movers: Movers) -> None:
        self._movers = movers

    def reserve(self, nbytes: int) -> Reservation:
        return Arena(nbytes)

    def copy(self, segments: Segments) -> None:
        copy(segments, self._movers)

    def export(self, addr: int, nbytes: int) -> bytes:
        return addr.to_bytes(8, "little")

    def open(self, exported: bytes) -> int:
        return int.from_bytes(exported, "little")
