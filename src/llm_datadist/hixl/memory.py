"""Registered memory: each range is a cache of the catalog's, whose id is the end of its handle."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from llm_datadist.core.geometry import CacheKind, Geometry
from llm_datadist.core.messages import MAX_CACHES
from llm_datadist.core.ranges import Ranges
from llm_datadist.errors import invalid
from llm_datadist.hixl.call import Exhausted
from llm_datadist.locks import make_lock

if TYPE_CHECKING:
    from llm_datadist.owner.catalog import Catalog
    from llm_datadist.running.threads import Errands
    from llm_datadist.types import Placement

#: as many as a peer is told of
MAX_RANGES: Final = MAX_CACHES


class Range(NamedTuple):
    """What a program registers; the same address and length again is the same memory."""

    addr: int
    nbytes: int
    placement: Placement
    is_local_only: bool


class Memory:
    """The memory of one engine. Thread-safe."""

    def __init__(self, catalog: Catalog, errands: Errands, before: int = 0) -> None:
        """Handles are above `before`."""
        self._before = before
        self._catalog = catalog
        #: changes of several steps are made where no signal's exception strikes
        self._errands = errands
        self._lock = make_lock()
        self._registered: dict[int, Range] = {}
        self._ids: dict[tuple[int, int], int] = {}
        #: the same by address; None when it has changed since
        self._ranges: Ranges | None = None

    def register(self, wanted: Range) -> int:
        """The handle of that memory, which peers reach from here on unless it is local only.

        Raises LLMException: LLM_PARAM_INVALID, LLM_OUT_OF_MEMORY for too many ranges.
        """
        return self._before + self._errands.run(partial(self._register, wanted))

    def _register(self, wanted: Range) -> int:
        with self._lock:
            place = wanted.addr, wanted.nbytes
            known = self._ids.get(place)
            if known is not None and self._catalog.is_leaving(known):
                # that goes soon, and this stays; if it does not go in time, it is known by itself
                self._registered.pop(known, None)
            elif known is not None:
                if self._registered[known] != wanted:
                    raise invalid(
                        f"{wanted.nbytes} bytes at {wanted.addr:#x} are registered already, with "
                        "another local_only or mem_type: deregister them first"
                    )
                return known
            if len(self._registered) >= MAX_RANGES:
                raise Exhausted(
                    f"{MAX_RANGES} ranges of memory are registered: a peer is told of no more; "
                    "register larger ones"
                )
            entry = self._catalog.register(
                Geometry(CacheKind.CONTINUOUS, 1, 1, wanted.nbytes),
                [wanted.addr],
                wanted.placement,
                is_remote_accessible=not wanted.is_local_only,
            )
            self._ids[place] = entry.cache_id
            self._registered[entry.cache_id] = wanted
            self._ranges = None
            return entry.cache_id

    def deregister(self, handle: int, timeout_s: float) -> None:
        """Waits until no transfer of this process uses it; nothing reaches it afterwards.

        An unknown handle is no error. Raises LLMException(LLM_TIMEOUT); it stays registered then.
        """
        leave = object()
        cache_id = handle - self._before
        try:
            entry = self._catalog.begin_to_leave(cache_id, leave)
            if entry is not None:
                self._catalog.await_uses(entry, timeout_s)
                self._errands.run(partial(self._forget, cache_id, leave))
        finally:
            self._catalog.leaving.pop(leave, None)

    def _forget(self, cache_id: int, leave: object) -> None:
        """Here and in the catalog, in one step."""
        with self._lock:
            if leave not in self._catalog.leaving:
                return  # the call was interrupted: it is registered still, maybe anew by now
            known = self._registered.pop(cache_id, None)
            if known is not None:
                self._ranges = None
                place = known.addr, known.nbytes
                if self._ids.get(place) == cache_id:
                    del self._ids[place]
            self._catalog.forget(cache_id)

    @property
    def ranges(self) -> Ranges:
        """All of it, by handle."""
        with self._lock:
            if self._ranges is None:
                self._ranges = Ranges(
                    (each.addr, each.nbytes, known) for known, each in self._registered.items()
                )
            return self._ranges
