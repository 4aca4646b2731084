"""core.addresses against a naive search, and how little it does among many caches."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist.core.addresses import Addresses
from llm_datadist.core.generations import Generations
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.registry import Registry
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.core.segments import U64

MOST = 2**64 - 1

#: close together, so that they often lie on each other; at both ends of the address space
near = st.integers(0, 24) | st.integers(MOST - 24, MOST)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    size = draw(st.integers(1, 8))
    addrs = draw(st.lists(near.map(lambda at: min(at, MOST + 1 - size)), min_size=1, max_size=3))
    return Layout.at(Geometry(CacheKind.BLOCKS, len(addrs), 1, size), addrs)


pieces = st.lists(st.tuples(near, st.integers(0, 9) | st.just(MOST)), min_size=1, max_size=3)


def columns(pairs: list[tuple[int, int]]) -> tuple[U64, U64]:
    addrs, nbytes = np.array(pairs, dtype=np.uint64).reshape(-1, 2).T
    return addrs, nbytes


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(layouts(), st.booleans()), max_size=6), st.lists(pieces, max_size=4))
def test_a_cache_is_found_where_a_naive_search_finds_one(
    changes: list[tuple[Layout, bool]], asked: list[list[tuple[int, int]]]
) -> None:
    places, live = Addresses(), dict[int, Layout]()
    for number, (layout, stays) in enumerate(changes):
        live[number] = layout
        places.add(number, layout)
        if not stays:
            oldest = min(live)
            del live[oldest]
            places.remove(oldest)
            places.remove(oldest)
        for each in asked:
            addrs, nbytes = columns(each)
            right = {cache_id for cache_id in live if live[cache_id].covers(addrs, nbytes)}
            found = places.find(addrs, nbytes)
            if each[0][1]:
                assert (found in right) if right else (found is None)
            else:  # of what is empty at an end it may be said that it lies nowhere
                assert found is None or found in right


def test_nothing_lies_nowhere() -> None:
    places = Addresses()
    none, one = columns([]), columns([(4096, 1)])
    assert places.find(*one) is None
    places.add(1, Layout.at(Geometry(CacheKind.BLOCKS, 1, 1, 8), [4096]))
    assert places.find(*none) is None
    assert places.find(*one) == 1


def test_of_caches_over_the_same_memory_the_oldest_that_is_there_is_found() -> None:
    places, layout = Addresses(), Layout.at(Geometry(CacheKind.BLOCKS, 2, 4, 8), [4096, 8192])
    for cache_id in (3, 5, 7):
        places.add(cache_id, layout)
    asked = columns([(8200, 8), (4096, 32)])
    assert places.find(*asked) == 3
    places.remove(3)
    assert places.find(*asked) == 5


@contextmanager
def counted() -> Iterator[list[str]]:
    """The calls of the block under it, as they come."""
    calls: list[str] = []

    def see(_frame: object, event: str, _arg: object) -> None:
        if event in ("call", "c_call"):
            calls.append(event)

    sys.setprofile(see)
    try:
        yield calls
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("num_caches", [10, 3000])
def test_a_cache_is_found_in_as_many_steps_among_many(num_caches: int) -> None:
    """A peer may ask as often as it likes, and others wait meanwhile."""
    registry = Registry(Generations(1))
    geometry = Geometry(CacheKind.BLOCKS, 4, 1, 64)
    entries = [
        registry.register(
            Layout.at(geometry, [at << 20 | tensor << 12 for tensor in range(4)]),
            Placement.HOST,
            (),
            is_remote_accessible=True,
        )
        for at in range(num_caches)
    ]
    last = columns([(int(entries[-1].layout.addrs[2]) + 8, 8)])
    nowhere = columns([(num_caches << 20, 8)])
    registry.find_at(*last)  # the first to ask has it sorted
    with counted() as calls:
        found, missed = registry.find_at(*last), registry.find_at(*nowhere)
    assert found is entries[-1]
    assert missed is None
    assert len(calls) < 120
