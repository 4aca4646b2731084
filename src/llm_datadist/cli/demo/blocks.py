"""Which block numbers of a paged cache are free."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class BlockPool:
    """A free list of block numbers, shuffled.

    A pool that has served requests for a while hands out numbers all over the place. This one does
    so from the start, so that every transfer of the demo is the scattered one of real life.
    """

    def __init__(self, num_blocks: int, seed: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether `count` blocks are free."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` block numbers. Raises ValueError when fewer are free."""
        if not self.can_allocate(count):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} are free")
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Give `blocks` back, to be handed out again after those that are free now."""
        self._free.extend(blocks)
