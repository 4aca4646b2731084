"""A pool of pages: which bytes of a memory are free, and which of them to hand out. Spec 8.1.

A *span* is a run of pages, free or handed out as a whole. A request takes the smallest free span
that holds it, of equal ones the first, and of that span the tail; a span that comes back joins the
free ones beside it at once. So no two free spans touch, and fragmentation is the only reason why a
request for no more than what is free can fail.

The pool keeps books on spans, not on pages: one of any size begins as a single free span. Searches
are binary, and to edit the sorted list moves 8 bytes for each free span after the place: a free and
an allocation take some 10 us among hundreds of free spans, and 65 us among 100,000.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Iterable


@final
@dataclass(frozen=True, slots=True)
class PoolUsage:
    """How full one part of a pool was at a moment."""

    name: str
    capacity_nbytes: int
    free_nbytes: int
    used_nbytes: int  #: handed out, the rounding up to pages included
    largest_free_nbytes: int  #: what a single request can have at most


class Pool(Protocol):
    """Hands out parts of one memory, as offsets from its beginning. Not thread-safe."""

    def allocate(self, nbytes: int) -> int:
        """The offset of `nbytes` that nobody else has. Raises LLMException(LLM_OUT_OF_MEMORY)."""

    def free(self, offset: int) -> None:
        """Takes back what `allocate` gave. Raises ValueError for any other offset."""

    def usage(self) -> tuple[PoolUsage, ...]:
        """How full each part of the pool is."""

    @property
    def capacity_nbytes(self) -> int:
        """The size of the memory: all offsets lie below it."""

    @property
    def free_nbytes(self) -> int:
        """Bytes that are free, in however many spans."""

    @property
    def used_nbytes(self) -> int:
        """Bytes that are handed out, the rounding up to pages included."""


@final
class PagePool:
    """Hands out spans of whole pages. Spec 8.1.

    The pool owns the whole pages among the `nbytes` from offset `base` on, and its offsets are
    multiples of a page from there. Not thread-safe: the owner's lock guards it.
    """

    def __init__(
        self, nbytes: int, page_nbytes: int, *, base: int = 0, name: str = "pages"
    ) -> None:
        self.name = name
        self.base = base
        self._page_nbytes = page_nbytes
        self._capacity_nbytes = nbytes - nbytes % page_nbytes
        self._used_nbytes = 0
        self._used: dict[int, int] = {}  #: offset -> nbytes of what is handed out
        self._free = _FreeSpans()
        if self._capacity_nbytes:
            self._free.add(base, self._capacity_nbytes)

    @property
    def capacity_nbytes(self) -> int:
        """Bytes in whole pages; what is left over is never used."""
        return self._capacity_nbytes

    @property
    def used_nbytes(self) -> int:
        """Bytes that are handed out, the rounding up to pages included."""
        return self._used_nbytes

    @property
    def free_nbytes(self) -> int:
        """Bytes that are free, in however many spans."""
        return self._capacity_nbytes - self._used_nbytes

    @property
    def largest_free_nbytes(self) -> int:
        """What a single request can have at most."""
        return self._free.largest_nbytes

    def usage(self) -> tuple[PoolUsage, ...]:
        """How full the pool is: it has a single part."""
        return (
            PoolUsage(
                self.name,
                self.capacity_nbytes,
                self.free_nbytes,
                self.used_nbytes,
                self.largest_free_nbytes,
            ),
        )

    def can_allocate(self, nbytes: int) -> bool:
        """Whether `allocate` has a span for this request."""
        return self._in_pages(nbytes) <= self.largest_free_nbytes

    def allocate(self, nbytes: int) -> int:
        """The offset of `nbytes`, rounded up to whole pages, at least one.

        Raises LLMException(LLM_OUT_OF_MEMORY) when no free span is long enough; nothing changed.
        """
        if not self.can_allocate(nbytes):
            raise out_of_memory(nbytes, self.usage())
        span_nbytes = self._in_pages(nbytes)
        offset = self._free.take(span_nbytes)
        self._used[offset] = span_nbytes
        self._used_nbytes += span_nbytes
        return offset

    def free(self, offset: int) -> None:
        """Takes back what `allocate` gave. Raises ValueError for any other offset."""
        if offset not in self._used:
            raise ValueError(f"nothing is handed out at offset {offset} of {self.name}")
        nbytes = self._used.pop(offset)
        self._used_nbytes -= nbytes
        self._free.add(offset, nbytes)

    def _in_pages(self, nbytes: int) -> int:
        return max(1, -(-nbytes // self._page_nbytes)) * self._page_nbytes


@final
class _FreeSpans:
    """The free spans by where they start, where they end, and how long they are."""

    def __init__(self) -> None:
        self._nbytes: dict[int, int] = {}  #: start -> nbytes
        self._starts: dict[int, int] = {}  #: end -> start
        self._by_size: list[tuple[int, int]] = []  #: (nbytes, start), ascending

    @property
    def largest_nbytes(self) -> int:
        return self._by_size[-1][0] if self._by_size else 0

    def add(self, start: int, nbytes: int) -> None:
        """Joined with the neighbours that it touches."""
        if start in self._starts:
            start = self._starts[start]
            nbytes += self._remove(start)
        if start + nbytes in self._nbytes:
            nbytes += self._remove(start + nbytes)
        self._nbytes[start] = nbytes
        self._starts[start + nbytes] = start
        insort(self._by_size, (nbytes, start))

    def take(self, nbytes: int) -> int:
        """The start of the tail of the smallest span that is long enough: there must be one."""
        _, start = self._by_size[bisect_left(self._by_size, (nbytes, 0))]
        rest_nbytes = self._remove(start) - nbytes
        if rest_nbytes:
            self.add(start, rest_nbytes)
        return start + rest_nbytes

    def _remove(self, start: int) -> int:
        nbytes = self._nbytes.pop(start)
        del self._starts[start + nbytes]
        del self._by_size[bisect_left(self._by_size, (nbytes, start))]
        return nbytes


def out_of_memory(nbytes: int, tried: Iterable[PoolUsage]) -> LLMException:
    """That none of the pools tried has room for a request, with what they do have."""
    found = "; ".join(
        f"{each.name}: {each.free_nbytes} of {each.capacity_nbytes} bytes free, "
        f"largest free span {each.largest_free_nbytes}"
        for each in tried
    )
    return LLMException(f"no room for {nbytes} bytes ({found})", LLMStatusCode.LLM_OUT_OF_MEMORY)
