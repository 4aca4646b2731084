"""The memory of allocated caches: taken from pools, given back when nothing uses it any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.core.geometry import Geometry, Layout
from llm_datadist.errors import LLMException
from llm_datadist.running.deadline import Deadline
from llm_datadist.transport.tcp import Permit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llm_datadist.core.registry import Entry
    from llm_datadist.memory.arena import MemoryPool
    from llm_datadist.owner.exposure import Exposure
    from llm_datadist.running.gate import Gate
    from llm_datadist.types import Placement

#: how long an answer may take to be seen as sent …
_NOTICED_S = 0.05
#: … and one that was taken back, of which a system call may be under way
_TAKEN_BACK_S = 0.2


class Allocations:
    """Thread-safe but for `give_back` and `reclaim`, which the catalog's lock guards."""

    def __init__(
        self, pools: Mapping[Placement, MemoryPool], gate: Gate, exposure: Exposure
    ) -> None:
        self._pools = pools
        self._gate = gate
        self._exposure = exposure
        #: freed while in use: their memory is still to go back to its pool
        self._doomed: set[Entry] = set()

    def take(self, geometry: Geometry, placement: Placement) -> Layout:
        """Memory for a cache. Raises LLMException: LLM_OUT_OF_MEMORY, LLM_PARAM_INVALID."""
        pool = self._pools[placement]
        try:
            addrs = pool.allocate_many(geometry.num_tensors, geometry.tensor_nbytes)
        except LLMException as error:
            kept = len(self._doomed)
            hint = f"; {kept} freed caches are still held by arrays or transfers" if kept else ""
            text = f"no memory for a cache in the {placement.name} pool: {error}{hint}"
            raise LLMException(text, error.status_code) from error
        try:
            return Layout.at(geometry, addrs)
        except BaseException:
            for addr in addrs:
                pool.free(addr)
            raise

    def free(self, layout: Layout, placement: Placement) -> None:
        """The end of `take`."""
        for addr in layout.addrs.tolist():
            self._pools[placement].free(addr)

    def hold(self, entry: Entry, index: int) -> object:
        """What keeps the memory of a tensor, also when its cache is freed."""
        nbytes = entry.layout.geometry.tensor_nbytes
        memory = self._pools[entry.placement].view(int(entry.layout.addrs[index]), nbytes)
        return memory, Pin(self._gate, entry)

    def give_back(self, freed: Entry) -> None:
        """Returns the memory of a cache that was freed, now or when nothing uses it any more.

        What is being sent of it is taken back, and so is what was sent for a push that has ended; a
        push that goes on has a ticket of its own, and may end well.
        """
        if self._gate.count(freed):
            self._doomed.add(freed)
            for permit in self._permits(freed):
                if not permit.is_revoked and (permit.ticket is None or permit.is_over):
                    permit.revoke(is_awaited=False)
        else:
            self._exposure.conceal(freed.cache_id)
            self.free(freed.layout, freed.placement)

    def await_last_uses(self) -> bool:
        """Whether the memory of a freed cache may go back, after a short wait.

        A peer that has the last byte of an answer may act on it before this end has noticed that
        the answer is sent.
        """
        doomed = list(self._doomed)
        is_read = any(permit.is_revoked for entry in doomed for permit in self._permits(entry))
        deadline = Deadline.after(_TAKEN_BACK_S if is_read else _NOTICED_S)
        return any(self._gate.drain(entry, max(0.0, deadline.remaining_s())) for entry in doomed)

    def reclaim(self) -> None:
        """Returns the memory of freed caches whose last use has ended."""
        doomed, self._doomed = self._doomed, set()
        for entry in doomed:
            self.give_back(entry)

    def _permits(self, entry: Entry) -> list[Permit]:
        """Under which peers read it."""
        return [use for use in self._gate.uses_beside(entry) if isinstance(use, Permit)]


class Pin:
    """A use of a cache that ends when nobody holds the pin, wherever that is found out."""

    __slots__ = ("_gate", "_token")

    def __init__(self, gate: Gate, entry: Entry) -> None:
        self._gate, self._token = gate, object()
        gate.running[self._token] = (entry,)  # no call: it goes through no door

    def __del__(self) -> None:
        self._gate.leave(self._token)
