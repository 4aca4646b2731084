"""What a benchmark moves: the shape of a paged cache, which of its blocks, and its memory."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.uint64]

_POISON = 0xFF


@dataclass(frozen=True)
class Workload:
    """A paged cache on each side, and the blocks that go from one to the other."""

    name: str
    num_tensors: int
    num_blocks: int
    block_nbytes: int
    num_moved: int
    tensors_per_layer: int = 2
    is_contiguous: bool = False

    @property
    def tensor_nbytes(self) -> int:
        return self.num_blocks * self.block_nbytes

    @property
    def cache_nbytes(self) -> int:
        return self.num_tensors * self.tensor_nbytes

    @property
    def moved_nbytes(self) -> int:
        return self.num_tensors * self.num_moved * self.block_nbytes

    @property
    def vector_nbytes(self) -> int:
        """What the vectors of both ends take, and the lists that they are made of."""
        return 8 * 16 * self.num_tensors * self.num_moved

    @property
    def num_segments(self) -> int:
        """What is moved, in pieces that lie together on neither side."""
        return self.num_tensors * (1 if self.is_contiguous else self.num_moved)

    def with_blocks_of(self, block_nbytes: int) -> Workload:
        """The same caches cut into other blocks; as many bytes are moved."""
        num_blocks = max(2, self.tensor_nbytes // block_nbytes)
        num_moved = max(1, num_blocks * self.num_moved // self.num_blocks)
        return replace(self, block_nbytes=block_nbytes, num_blocks=num_blocks, num_moved=num_moved)

    def blocks(self) -> tuple[Blocks, Blocks]:
        """The blocks to read and those to fill: scattered, and the same in every process."""
        if self.is_contiguous:
            run = np.arange(self.num_moved, dtype=np.uint64)
            return run, run
        random = np.random.default_rng(0)
        src, dst = (random.permutation(self.num_blocks)[: self.num_moved] for _ in range(2))
        return src.astype(np.uint64), dst.astype(np.uint64)

    def vectors(self, base: int, blocks: Blocks) -> Blocks:
        """Those blocks of all tensors as `struct iovec`s, tensor by tensor."""
        tensors = np.arange(self.num_tensors, dtype=np.uint64) * np.uint64(self.tensor_nbytes)
        offsets = np.add.outer(tensors, blocks * np.uint64(self.block_nbytes)).ravel()
        vectors = np.empty((len(offsets), 2), dtype=np.uint64)
        vectors[:, 0] = offsets + np.uint64(base)
        vectors[:, 1] = self.block_nbytes
        return vectors


SHAPES = {
    shape.name: shape
    for shape in (
        Workload("llama3-8b", 64, 512, 32 * 1024, 256),
        Workload("llama3-70b-tp8", 160, 512, 4 * 1024, 256),
        Workload("deepseek-mla", 61, 512, 18 * 1024, 256, tensors_per_layer=1),
        Workload("one-block", 1, 512, 32 * 1024, 1, tensors_per_layer=1),
    )
}


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

    def _words(self) -> Blocks:
        return self._bytes.view(np.uint64)

    def _pattern(self) -> Blocks:
        return np.arange(self._workload.cache_nbytes // 8, dtype=np.uint64)
