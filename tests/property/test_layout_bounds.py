"""core.geometry against range checks on Python's integers, which do not overflow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.errors import LLMException, LLMStatusCode

examples = settings(max_examples=150, deadline=None)

END = 2**64

geometries = st.builds(
    Geometry,
    st.sampled_from(CacheKind),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 100) | st.sampled_from([2**20, 2**59]),
)


def around(*values: int) -> st.SearchStrategy[int]:
    """Numbers that lie close to some."""
    return st.builds(int.__add__, st.sampled_from(values), st.integers(-3, 3))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Tensors anywhere, often at an end of the address space; they may overlap."""
    geometry = draw(geometries)
    last = END - geometry.tensor_nbytes
    addr = st.integers(0, 300) | st.integers(last - 300, last) | st.integers(0, last)
    count = geometry.num_tensors
    return Layout.at(geometry, draw(st.lists(addr, min_size=count, max_size=count)))


@st.composite
def ranges_near(draw: st.DrawFn, layout: Layout) -> list[tuple[int, int]]:
    """Ranges that begin and end close to where tensors do, and some that wrap around."""
    size = layout.geometry.tensor_nbytes
    edges = [edge for start in layout.addrs.tolist() for edge in (start, start + size)]
    addr = around(0, END, *edges) | st.integers(0, END - 1)
    nbytes = around(0, size, size // 2, 2**63, END, END - size) | st.integers(0, END - 1)
    pairs = draw(st.lists(st.tuples(addr, nbytes), max_size=3))
    return [(start % END, length % END) for start, length in pairs]


@examples
@given(st.data())
def test_a_layout_covers_ranges_that_lie_within_a_tensor_each_and_no_others(
    data: st.DataObject,
) -> None:
    layout = data.draw(layouts())
    ranges = data.draw(ranges_near(layout))
    size = layout.geometry.tensor_nbytes
    is_covered = all(
        any(start <= addr and addr + nbytes <= start + size for start in layout.addrs.tolist())
        for addr, nbytes in ranges
    )
    addrs, nbytes = (np.array([r[i] for r in ranges], dtype=np.uint64) for i in range(2))
    assert layout.covers(addrs, nbytes) == is_covered


@examples
@given(layouts(), st.data())
def test_a_layout_covers_every_row_of_every_tensor(layout: Layout, data: st.DataObject) -> None:
    geometry = layout.geometry
    row = np.uint64(data.draw(st.integers(0, geometry.num_rows - 1)) * geometry.row_nbytes)
    rows = np.full(geometry.num_tensors, geometry.row_nbytes, dtype=np.uint64)
    assert layout.covers(layout.addrs + row, rows)


@examples
@given(geometry=geometries, data=st.data())
def test_a_layout_is_made_of_one_address_with_room_per_tensor_and_of_nothing_else(
    geometry: Geometry, data: st.DataObject
) -> None:
    room = END - geometry.tensor_nbytes
    addr = around(0, room, END) | st.integers(0, room)
    count = data.draw(st.just(geometry.num_tensors) | st.integers(0, 5))
    addrs = data.draw(st.lists(addr, min_size=count, max_size=count))
    is_possible = len(addrs) == geometry.num_tensors and all(0 <= a <= room for a in addrs)
    if is_possible:
        assert Layout.at(geometry, addrs).addrs.tolist() == addrs
    else:
        with pytest.raises(LLMException) as caught:
            Layout.at(geometry, addrs)
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
