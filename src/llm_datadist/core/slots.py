"""A pool with size classes: small requests do not break up what large ones need. Spec 7.2, 8.2."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final, final

from llm_datadist.core.pages import PagePool, PoolUsage, out_of_memory

if TYPE_CHECKING:
    from llm_datadist.pool_config import BufPoolConfig, PoolConfig

GENERAL_PAGE_NBYTES: Final = 64 * 1024


@final
class SlotPool:
    """Page pools one after the other in one memory: the size classes, then the general pools.

    A request goes to the first class that serves its size. When that class has no room for it, or
    no class is for requests so large, the general pools are tried in order: what the buffer pool's
    size leaves after its classes, in pages of 64 KiB, and then `mem_pool`, where both kinds of pool
    are configured. The next larger class is never tried: it would fill up with what it is not for.

    A buffer pool may be smaller than its classes: they are whole, and nothing is left after them.
    Not thread-safe: the owner's lock guards it.
    """

    def __init__(self, config: BufPoolConfig, mem_pool: PoolConfig | None = None) -> None:
        self._limits = [each.max_nbytes for each in config.classes]
        self._parts: list[PagePool] = []
        for each in config.classes:
            self._add(f"class {each.max_nbytes}", each.total_nbytes, each.block_nbytes)
        rest_nbytes = (config.pool_nbytes or 0) - self.capacity_nbytes
        self._add("general", max(0, rest_nbytes), GENERAL_PAGE_NBYTES)
        if mem_pool is not None:
            self._add("mem_pool", mem_pool.memory_nbytes, mem_pool.page_nbytes)
        num_classes = len(config.classes)
        self._classes, self._general = self._parts[:num_classes], self._parts[num_classes:]

    @property
    def capacity_nbytes(self) -> int:
        """The size of all parts together: offsets lie below it."""
        return sum(part.capacity_nbytes for part in self._parts)

    @property
    def used_nbytes(self) -> int:
        """Bytes that are handed out, the rounding up to pages included."""
        return sum(part.used_nbytes for part in self._parts)

    @property
    def free_nbytes(self) -> int:
        """Bytes that are free, those that only small requests can have included."""
        return sum(part.free_nbytes for part in self._parts)

    def usage(self) -> tuple[PoolUsage, ...]:
        """How full each class is, and then each general pool."""
        return _usage(self._parts)

    def allocate(self, nbytes: int) -> int:
        """The offset of `nbytes`, rounded up to whole pages of the part that has room.

        Raises LLMException(LLM_OUT_OF_MEMORY) when none of the parts for it has; nothing changed.
        """
        parts = self._parts_for(nbytes)
        for part in parts:
            if part.can_allocate(nbytes):
                return part.allocate(nbytes)
        raise out_of_memory(nbytes, _usage(parts))

    def free(self, offset: int) -> None:
        """Takes back what `allocate` gave. Raises ValueError for any other offset."""
        index = bisect_right(self._parts, offset, key=lambda part: part.base) - 1
        self._parts[index].free(offset)

    def _add(self, name: str, nbytes: int, page_nbytes: int) -> None:
        base = self.capacity_nbytes
        self._parts.append(PagePool(nbytes, page_nbytes, base=base, name=name))

    def _parts_for(self, nbytes: int) -> list[PagePool]:
        index = bisect_left(self._limits, nbytes)
        return self._classes[index : index + 1] + self._general


def _usage(parts: list[PagePool]) -> tuple[PoolUsage, ...]:
    return tuple(usage for part in parts for usage in part.usage())
