"""The memory of one side of a benchmark: what is in it at first, and whether it arrived."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from llm_datadist.cli.bench.workload import Workload

_POISON = 0xFF


class CacheMemory:
    """The tensors of a paged cache, one behind the other."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self.nbytes = workload.cache_nbytes
        self._bytes = np.frombuffer(mmap.mmap(-1, self.nbytes), dtype=np.uint8)
        self.addr = int(self._bytes.ctypes.data)
        self.poison()

    @property
    def tensor_addrs(self) -> list[int]:
        step = self._workload.tensor_nbytes
        return [self.addr + index * step for index in range(self._workload.num_tensors)]

    def fill(self) -> None:
        """What every source holds: each word its own number."""
        self._words()[:] = self._pattern()

    def poison(self) -> None:
        """What no source holds; it also takes the pages, so that no benchmark pays for that."""
        self._bytes[:] = _POISON

    def has_arrived(self) -> bool:
        """Whether the moved blocks hold what their sources do, and nothing else was touched."""
        shape = self._workload
        src, dst = shape.blocks()
        blocks = self._words().reshape(shape.num_tensors, shape.num_blocks, -1)
        pattern = self._pattern().reshape(blocks.shape)
        others = np.setdiff1d(np.arange(shape.num_blocks, dtype=np.uint64), dst)
        poison = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
        return all(
            np.array_equal(tensor[dst], expected[src]) and bool((tensor[others] == poison).all())
            for tensor, expected in zip(blocks, pattern, strict=True)
        )

    def _words(self) -> npt.NDArray[np.uint64]:
        return self._bytes.view(np.uint64)

    def _pattern(self) -> npt.NDArray[np.uint64]:
        return np.arange(self._workload.cache_nbytes // 8, dtype=np.uint64)
