"""Tiled: segments that lie alike in each of several tensors, listed only when they are due.

So lie the blocks of a request, in every layer. Each thread that moves a part of them lists its own,
a few at a time: columns that fit the processor's cache and the allocator's heap cost a third of
what long ones do.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final, final

from llm_datadist.core.segments import ANY_NBYTES, AT_ONCE, Segments, listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.core.segments import U64, Vectors

#: fewer tensors for each part would make the parts unequal
_MANY_PLACES: Final = 16


@final
class Tiled:
    """Byte ranges to copy, as `Segments`: each strip at each place. Immutable."""

    __slots__ = ("dst", "src", "strips")

    def __init__(self, src: U64, dst: U64, strips: Segments) -> None:
        """`src` and `dst` are the addresses of the places; strips lie at offsets from there."""
        self.src, self.dst, self.strips = src, dst, strips

    def __len__(self) -> int:
        """Of segments."""
        return len(self.src) * len(self.strips)

    @property
    def total_nbytes(self) -> int:
        return len(self.src) * self.strips.total_nbytes

    def flat(self) -> Segments:
        """All of them."""
        return listed(self.src, self.dst, self.strips)

    def src_iovecs(self, before: Vectors = (), behind: Vectors = ()) -> U64:
        """As of `Segments`."""
        return self.flat().src_iovecs(before, behind)

    def dst_iovecs(self, before: Vectors = (), behind: Vectors = ()) -> U64:
        """As of `Segments`."""
        return self.flat().dst_iovecs(before, behind)

    def landing(self) -> Segments:
        """As of `Segments`."""
        return self.flat()

    def bounded(self, max_nbytes: int) -> Tiled:
        """As `Segments.bounded`."""
        return Tiled(self.src, self.dst, self.strips.bounded(max_nbytes))

    def windows(self, count: int, max_nbytes: int = ANY_NBYTES) -> Iterator[Segments]:
        """As `Segments.windows`."""
        most = max(count, AT_ONCE)
        for strips in self.strips.windows(most):
            at_once = max(1, most // len(strips))
            for start in range(0, len(self.src), at_once):
                places = slice(start, start + at_once)
                segments = listed(self.src[places], self.dst[places], strips)
                yield from segments.windows(count, max_nbytes)

    def split(self, parts: int) -> list[Segments] | list[Tiled]:
        """As `Segments.split`."""
        if len(self.src) < _MANY_PLACES * parts:
            return self.flat().split(parts)
        bounds = [len(self.src) * part // parts for part in range(parts + 1)]
        return [
            Tiled(self.src[start:stop], self.dst[start:stop], self.strips)
            for start, stop in pairwise(bounds)
        ]
