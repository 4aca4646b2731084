"""Addresses: which cache lies at one, found in steps that do not grow with how many there are.

The tensors of all places are kept sorted by their first byte, beside how far the tensors up to each
one reach: so those that may contain a byte are neighbours, and as many as lie on each other there.
The columns are made when somebody asks for the first time since a cache came or went.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.core.geometry import Layout
    from llm_datadist.core.segments import U64


class _Place(NamedTuple):
    """Memory, and the oldest cache over it: one pool may be many caches."""

    cache_id: int
    layout: Layout


class _Tensors(NamedTuple):
    """The tensors of all places, by their first byte."""

    starts: U64
    #: the furthest last byte of the tensors up to each
    reach: U64
    #: the place of each, as an index
    owners: list[int]
    places: list[_Place]


class Addresses:
    """Where caches lie. Not thread-safe: the catalog's lock guards it.

    A finalizer may change it between any two steps.
    """

    def __init__(self) -> None:
        self._layouts: dict[int, Layout] = {}
        #: None when a cache has come or gone since they were made
        self._tensors: _Tensors | None = None
        #: another one since the last change
        self._state = object()

    def add(self, cache_id: int, layout: Layout) -> None:
        """The cache lies there, over others maybe; ids count up."""
        self._layouts[cache_id] = layout
        self._has_changed()

    def remove(self, cache_id: int) -> None:
        """The end of `add`. Nothing happens for an id that is none."""
        if self._layouts.pop(cache_id, None) is not None:
            self._has_changed()

    def find(self, addrs: U64, nbytes: U64) -> int | None:
        """The cache in whose tensors all of these bytes lie; None when there is none.

        Of those over the same memory it is the oldest; of others that lie on each other there, one.
        """
        if len(addrs):
            for place in self._containing(int(addrs[0]), int(nbytes[0])):
                if place.layout.covers(addrs, nbytes):
                    return place.cache_id
        return None

    def _has_changed(self) -> None:
        self._state = object()
        self._tensors = None

    def _containing(self, addr: int, nbytes: int) -> Iterator[_Place]:
        """The places that may contain these bytes; that whose tensor begins last comes first."""
        tensors = self._tensors or self._sorted()
        last_byte = addr + max(nbytes, 1) - 1
        if last_byte >= 2**64:
            return
        first = np.searchsorted(tensors.reach, np.uint64(last_byte))
        behind = np.searchsorted(tensors.starts, np.uint64(addr), side="right")
        for owner in dict.fromkeys(reversed(tensors.owners[first:behind])):
            yield tensors.places[owner]

    def _sorted(self) -> _Tensors:
        state, places = self._state, _places_of(self._layouts.copy())
        counts = [len(place.layout.addrs) for place in places]
        sizes = [max(1, place.layout.geometry.tensor_nbytes) for place in places]
        none = np.empty(0, dtype=np.uint64)
        starts = np.concatenate([none, *(place.layout.addrs for place in places)])
        last_bytes = starts + np.repeat(np.array(sizes, dtype=np.uint64) - np.uint64(1), counts)
        order = np.argsort(starts, kind="stable")
        tensors = _Tensors(
            starts[order],
            np.maximum.accumulate(last_bytes[order]),
            np.repeat(np.arange(len(places)), counts)[order].tolist(),
            places,
        )
        self._tensors = tensors
        if self._state is not state:  # a finalizer came in between
            self._tensors = None
        return tensors


def _places_of(layouts: dict[int, Layout]) -> list[_Place]:
    found: dict[tuple[int, bytes], _Place] = {}
    for cache_id, layout in layouts.items():
        memory = layout.geometry.tensor_nbytes, layout.addrs.tobytes()
        found.setdefault(memory, _Place(cache_id, layout))
    return list(found.values())
