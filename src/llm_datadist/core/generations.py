"""Generation words: one memory cell per cache, which says whether what peers know still holds.

A one-sided reader takes the word along with the data, before and after it, and so sees without
asking the owner that a cache was freed or changed hands. A closed word is
0, which is never a generation.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.core.segments import U64

STALE = 0
WORD_NBYTES = 8
_PAGE_WORDS = 512


class Generations:
    """Hands out words and the generations in them. Not thread-safe: the registry's lock guards it.

    `seed` is a random number: generations of a restarted process then never match the old ones,
    even when they come to lie at the same address.
    """

    def __init__(self, seed: int, on_page: Callable[[int, int], None] | None = None) -> None:
        """`on_page` is told of memory before words in it are handed out: address, length."""
        self._on_page = on_page
        self._next = itertools.count(seed % 2**62 + 1)
        self._pages: list[U64] = []
        self._free: list[int] = []
        self._cells: dict[int, tuple[U64, int]] = {}

    def open(self) -> tuple[int, int]:
        """A word of a new generation: (address, generation)."""
        if not self._free:
            self._add_page()
        addr = self._free.pop()
        return addr, self.renew(addr)

    def renew(self, addr: int) -> int:
        """Gives the word the next generation: whoever holds the former one must ask again."""
        page, index = self._cells[addr]
        generation = next(self._next)
        page[index] = generation
        return generation

    def cell(self, addr: int) -> U64:
        """The word as an array of one: to write STALE into it is one step."""
        page, index = self._cells[addr]
        return page[index : index + 1]

    def close(self, addr: int) -> None:
        page, index = self._cells[addr]
        page[index] = STALE
        self._free.append(addr)

    def _add_page(self) -> None:
        page = np.zeros(_PAGE_WORDS, dtype=np.uint64)
        self._pages.append(page)
        base = page.ctypes.data
        if self._on_page is not None:
            self._on_page(base, page.nbytes)
        for index in reversed(range(_PAGE_WORDS)):
            addr = base + index * WORD_NBYTES
            self._cells[addr] = (page, index)
            self._free.append(addr)
