"""Patterns: layers and heads of one layout, and where in another they go, as strides.

A pattern and a request - which blocks, which tokens - make `Segments`. It is arithmetic on columns;
no loop runs over blocks or tokens.

The tokens of a request are cut where a block ends on either side. Of such a *strip*, which lies in
one block here and in one there, each axis of the layouts is two columns of offsets. An axis whose
offsets at both ends go up by what is contiguous so far is absorbed: it makes segments longer. The
others make *teeth*: each tooth of each strip in each plane - K or V of a layer - is a piece, so
they are an outer sum. Thus equal layouts give whole blocks, runs of blocks merge, HND cut by heads
gives a piece for each head and block, and NHD one for each token, without a case for any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from llm_datadist.core.combs import Combs, Teeth
from llm_datadist.core.segments import U64, Segments
from llm_datadist.core.strips import strips_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.strips import Tokens
    from llm_datadist.kv_layout import KVLayout


class HeadRun(NamedTuple):
    """Heads of one source, by their places there and in the destination."""

    source: int  #: which of the sources
    src: int
    dst: int
    num_heads: int


class Axis(NamedTuple):
    """Offsets of an axis' indices from its first, at both ends."""

    src: U64
    dst: U64

    @classmethod
    def of(cls, src: U64, dst: U64, src_step: int, dst_step: int) -> Axis:
        """Of indices, with so many bytes from one to the next."""
        return cls(src * np.uint64(src_step), dst * np.uint64(dst_step))

    def extends(self, nbytes: int) -> bool:
        """Whether pieces of `nbytes` at these offsets are one piece, at both ends."""
        steps = np.arange(len(self.src), dtype=np.uint64) * np.uint64(nbytes)
        return bool((self.src == steps).all() and (self.dst == steps).all())

    def across(self, inner: Axis) -> Axis:
        """Every index of this one with every one of another."""
        return Axis(*(np.add.outer(a, b).ravel() for a, b in zip(self, inner, strict=True)))


class Grid(NamedTuple):
    """Pieces as an outer sum: in each plane, at each strip, each tooth."""

    planes: Axis
    #: equally long where there are several teeth
    strips: Segments
    teeth: Teeth

    def __len__(self) -> int:
        return len(self.planes.src) * len(self.strips) * len(self.teeth)

    @property
    def total_nbytes(self) -> int:
        return len(self.planes.src) * self.strips.total_nbytes * len(self.teeth)

    def windows(self, count: int) -> Iterator[Pieces]:
        """All pieces, at most so many at a time."""
        for teeth in self.teeth.chunks(count):
            for strips in self.strips.windows(count // len(teeth)):
                at_once = max(1, count // (len(strips) * len(teeth)))
                for start in range(0, len(self.planes.src), at_once):
                    planes = Axis(*(column[start : start + at_once] for column in self.planes))
                    yield _across(planes, strips, teeth)


class Windows:
    """The pieces of a request, of which only so many exist at a time. Immutable."""

    __slots__ = ("_count", "_grids", "total_nbytes")

    def __init__(self, grids: Sequence[Grid], count: int) -> None:
        self._grids = grids
        self._count = count
        self.total_nbytes = sum(grid.total_nbytes for grid in grids)

    def __len__(self) -> int:
        """Of pieces."""
        return sum(map(len, self._grids))

    @property
    def are_many(self) -> bool:
        """Whether they do not exist all at a time."""
        return len(self) > self._count

    def __iter__(self) -> Iterator[Pieces]:
        for grid in self._grids:
            yield from grid.windows(self._count)


class Planes(NamedTuple):
    """Where the heads of a layer, of K or V, begin: the tensor, and how far into it."""

    tensors: npt.NDArray[np.int64]
    offsets: U64

    def at(self, addrs: U64) -> U64:
        return addrs[self.tensors] + self.offsets


@dataclass(frozen=True, eq=False)
class Pattern:
    """Layers and heads of one source, and where they go in the destination. Made by `reshard`."""

    src: KVLayout
    dst: KVLayout
    heads: HeadRun
    #: places of layers, which pair up
    src_layers: tuple[int, ...]
    dst_layers: tuple[int, ...]

    @property
    def source(self) -> int:
        """Which of the sources."""
        return self.heads.source

    @property
    def nbytes_per_token(self) -> int:
        """What it moves of one token."""
        head_nbytes = self.src.head_size * self.src.data_type.itemsize
        return len(self.src_layers) * self.src.num_kv * self.heads.num_heads * head_nbytes

    def segments(
        self,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        tokens: Tokens,
        src_addrs: U64,
        dst_addrs: U64,
    ) -> Segments:
        """What to copy, between caches whose tensors lie at these addresses.

        `tokens` counts from the beginning of the sequence; the first block of each list is the one
        that has the first of them. Raises LLMException (LLM_PARAM_INVALID) unless each list has
        exactly the blocks in which the tokens lie, and the caches have those blocks.
        """
        windows = self.windows(src_blocks, dst_blocks, tokens, src_addrs, dst_addrs, count=2**62)
        return joined([window.flat() for window in windows])

    def windows(
        self,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        tokens: Tokens,
        src_addrs: U64,
        dst_addrs: U64,
        *,
        count: int,
    ) -> Windows:
        """The same, at most `count` segments at a time, so that memory stays bounded."""
        return Windows(self.grids(src_blocks, dst_blocks, tokens, src_addrs, dst_addrs), count)

    def grids(
        self,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        tokens: Tokens,
        src_addrs: U64,
        dst_addrs: U64,
    ) -> list[Grid]:
        """The same, as the few outer sums that it is."""
        planes = Axis(self._src_planes.at(src_addrs), self._dst_planes.at(dst_addrs))
        return self._grids(planes, src_blocks, dst_blocks, tokens)

    def num_segments(
        self, src_blocks: Sequence[int], dst_blocks: Sequence[int], tokens: Tokens = None
    ) -> int:
        """How many segments that takes, without making them. Raises as `segments` does."""
        planes = Axis(self._src_planes.offsets, self._dst_planes.offsets)
        return sum(map(len, self._grids(planes, src_blocks, dst_blocks, tokens)))

    # -- parts of the above --

    def _grids(
        self,
        planes: Axis,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        tokens: Tokens,
    ) -> list[Grid]:
        strips = strips_of(self.src, src_blocks, self.dst, dst_blocks, tokens)
        by_teeth: dict[object, tuple[Axis, Axis, list[Segments]]] = {}
        for count in _distinct(strips.nbytes):
            nbytes, left = self._stretch(count)
            alike = strips.nbytes == count
            pieces = Segments(
                strips.src[alike], strips.dst[alike], np.full(int(alike.sum()), nbytes, np.uint64)
            )
            # strips of other lengths may merge with these, as long as both have the same teeth
            which = tuple(left), count if "N" in left else None
            by_teeth.setdefault(which, (*_lanes_and_teeth(list(left.values())), []))[2].append(
                pieces
            )
        return [
            Grid(planes.across(lanes), strips, Teeth.of(*teeth, int(strips.nbytes[0])))
            for lanes, teeth, pieces in by_teeth.values()
            for strips in _alike(_merged(joined(pieces)), len(teeth.src))
        ]

    def _stretch(self, count: int) -> tuple[int, dict[str, Axis]]:
        """How long segments are in a strip of so many tokens, and the axes that are left over."""
        tokens, strides = _steps(count), (self.src.stride("N"), self.dst.stride("N"))
        left = {**self._axes, "N": Axis.of(tokens, tokens, *strides)}
        nbytes = self.src.data_type.itemsize
        while name := next((name for name, axis in left.items() if axis.extends(nbytes)), ""):
            nbytes *= len(left.pop(name).src)
        return nbytes, left

    @cached_property
    def _axes(self) -> dict[str, Axis]:
        """The axes of a strip but its tokens. L and K are none unless both ends have them inside:
        else they are among the planes."""
        src, dst = self.src, self.dst
        columns = {
            "L": (_u64(self.src_layers), _u64(self.dst_layers)),
            "K": (_steps(src.num_kv),) * 2,
            "H": (_steps(self.heads.num_heads),) * 2,
            "D": (_steps(src.head_size),) * 2,
        }
        return {
            axis: Axis.of(here - here[0], there - there[0], src.stride(axis), dst.stride(axis))
            for axis, (here, there) in columns.items()
            if axis not in "LK" or self._is_inside(axis)
        }

    @cached_property
    def _src_planes(self) -> Planes:
        return self._planes(self.src, self.src_layers, self.heads.src)

    @cached_property
    def _dst_planes(self) -> Planes:
        return self._planes(self.dst, self.dst_layers, self.heads.dst)

    def _planes(self, layout: KVLayout, layers: Sequence[int], head: int) -> Planes:
        """Of each layer and of K and V; of the first alone where that is an axis."""
        places = [
            (layer, kv)
            for layer in (layers[:1] if self._is_inside("L") else layers)
            for kv in range(1 if self._is_inside("K") else layout.num_kv)
        ]
        steps = layout.stride("L"), layout.stride("K"), layout.stride("H")
        return Planes(
            np.array([layout.tensor(layer, kv) for layer, kv in places], dtype=np.int64),
            _u64([layer * steps[0] + kv * steps[1] + head * steps[2] for layer, kv in places]),
        )

    def _is_inside(self, axis: str) -> bool:
        return axis in self.src.order and axis in self.dst.order


#: 4 MiB of offsets; a peer's layout may have gaps between all its elements
_MOST_TEETH: Final = 1 << 18
#: the offset of what is not repeated
_ONE: Final = Axis(np.zeros(1, np.uint64), np.zeros(1, np.uint64))


def _lanes_and_teeth(axes: Sequence[Axis]) -> tuple[Axis, Axis]:
    """The inner axes are teeth, all of which exist at once; outer ones, if there were too many."""
    inner = len(axes)
    num_teeth = 1
    while inner and num_teeth * len(axes[inner - 1].src) <= _MOST_TEETH:
        inner -= 1
        num_teeth *= len(axes[inner].src)
    return reduce(Axis.across, axes[:inner], _ONE), reduce(Axis.across, axes[inner:], _ONE)


def _across(planes: Axis, strips: Segments, teeth: Teeth) -> Pieces:
    places = Axis(strips.src, strips.dst)
    if len(teeth) > 1:
        return Combs(*planes.across(places), teeth)
    planes = Axis(planes.src + teeth.src, planes.dst + teeth.dst)
    return Segments(*planes.across(places), np.tile(strips.nbytes, len(planes.src)))


def _alike(strips: Segments, num_teeth: int) -> list[Segments]:
    """By their lengths, where each has several teeth."""
    if num_teeth == 1:
        return [strips]
    which = [strips.nbytes == nbytes for nbytes in _distinct(strips.nbytes)]
    return [Segments(strips.src[at], strips.dst[at], strips.nbytes[at]) for at in which]


def joined(parts: Sequence[Segments]) -> Segments:
    """All of them as one."""
    if len(parts) == 1:
        return parts[0]
    return Segments(
        np.concatenate([part.src for part in parts]),
        np.concatenate([part.dst for part in parts]),
        np.concatenate([part.nbytes for part in parts]),
    )


def _merged(pieces: Segments) -> Segments:
    """What touches at both ends in one piece; sorts first, so that order is free."""
    order = np.lexsort((pieces.src, pieces.dst - pieces.src))
    return Segments(pieces.src[order], pieces.dst[order], pieces.nbytes[order]).coalesced()


def _distinct(counts: U64) -> list[int]:
    """The values of a column, each once; np.unique would load numpy.ma."""
    ordered = np.sort(counts)
    return ordered[np.flatnonzero(np.diff(ordered, prepend=np.uint64(0)))].tolist()  # type: ignore[no-any-return]


def _steps(count: int) -> U64:
    return np.arange(count, dtype=np.uint64)


def _u64(values: Sequence[int]) -> U64:
    return np.array(values, dtype=np.uint64)
