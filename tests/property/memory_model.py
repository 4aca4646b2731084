"""Memory for plans to act on: one cell per byte, every cell with a value that no other has.

A byte that went to a wrong place, or was not moved at all, therefore cannot look right by chance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from llm_datadist.core.geometry import CacheKind, Geometry, Layout

if TYPE_CHECKING:
    from llm_datadist.core.segments import Segments

Cells = npt.NDArray[np.int64]

BLOCK_KINDS = (CacheKind.BLOCKS, CacheKind.MIX)
ROW_KINDS = (CacheKind.CONTINUOUS, CacheKind.MIX)


@dataclass(frozen=True)
class Memory:
    """The memory of one process, which begins at address `base` and holds one cache."""

    base: int
    cells: Cells
    layout: Layout

    @property
    def geometry(self) -> Geometry:
        return self.layout.geometry

    def copy(self) -> Memory:
        return replace(self, cells=self.cells.copy())

    def row(self, tensor: int, row: int) -> Cells:
        """The cells of one row of one tensor: a view."""
        nbytes = self.geometry.row_nbytes
        start = int(self.layout.addrs[tensor]) - self.base + row * nbytes
        return self.cells[start : start + nbytes]

    def at(self, addr: int, nbytes: int) -> Cells:
        """The cells at an address: a view. Fails for what lies outside this memory."""
        start = addr - self.base
        assert 0 <= start <= start + nbytes <= len(self.cells)
        return self.cells[start : start + nbytes]


def execute(segments: Segments, source: Memory, destination: Memory) -> None:
    """Moves what segments describe, one after the other."""
    columns = (segments.src, segments.dst, segments.nbytes)
    for src, dst, nbytes in zip(*(column.tolist() for column in columns), strict=True):
        destination.at(dst, nbytes)[:] = source.at(src, nbytes)


@st.composite
def memories(
    draw: st.DrawFn, geometry: Geometry, *, is_destination: bool = False, min_gap: int = 0
) -> Memory:
    """Memory with a cache of this geometry: tensors in any order, touching or with gaps between."""
    count = geometry.num_tensors
    gap = st.sampled_from([0, 0, 1, 5]).map(lambda nbytes: nbytes + min_gap)
    gaps = draw(st.lists(gap, min_size=count + 1, max_size=count + 1))
    offsets = [0] * count
    end = gaps[0]
    for tensor, gap_behind in zip(draw(st.permutations(range(count))), gaps[1:], strict=True):
        offsets[tensor] = end
        end += geometry.tensor_nbytes + gap_behind
    base = draw(st.sampled_from([0, 4096, 2**47, 2**64 - end]))
    cells = np.arange(1, end + 1, dtype=np.int64) * (-1 if is_destination else 1)
    return Memory(base, cells, Layout.at(geometry, [base + offset for offset in offsets]))


@st.composite
def distinct_blocks(draw: st.DrawFn, num_rows: int, max_size: int) -> list[int]:
    """Block indices without repetition: scattered, a run, a run backwards, one alone, or all."""
    size = draw(st.integers(1, min(num_rows, max_size)))
    start = draw(st.integers(0, num_rows - size))
    run = list(range(start, start + size))
    shapes = [
        st.just(run),
        st.just(run[::-1]),
        st.permutations(run),
        st.permutations(range(num_rows)).map(lambda rows: list(rows[:size])),
    ]
    return draw(st.one_of(shapes))
