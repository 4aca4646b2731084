"""The memory of a pool: address space that is reserved at once and taken page by page.

Pages that were touched stay with the pool until it closes. Given back when they are freed, they
would be faulted in again by the next transfer, which then takes six times as long (512 MiB: 1.7
against 10.5 GB/s). The footprint is about the peak use all the same: best fit prefers what came
back to the one large span that nobody has touched yet.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, final

import numpy as np

from llm_datadist.core.pages import PagePool
from llm_datadist.core.slots import SlotPool
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.locks import make_lock
from llm_datadist.system_errors import pass_on_handlers, refusals_ignored

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from llm_datadist.core.pages import Pool, PoolUsage
    from llm_datadist.memory.device import Device
    from llm_datadist.pool_config import BufPoolConfig, PoolConfig

#: modules before Python 3.13 lack it; this is the number on x86-64 and Arm
_MAP_NORESERVE: Final[int] = getattr(mmap, "MAP_NORESERVE", 0x4000)


@final
class Arena:
    """One private mapping of at least `nbytes`, aligned to the system's pages.

    It takes address space only: memory comes as pages are touched. Raises
    LLMException(LLM_OUT_OF_MEMORY) when the system refuses.
    """

    def __init__(self, nbytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            # the system maps nothing of no bytes, while a pool may have no page
            self._mapping = mmap.mmap(-1, max(nbytes, 1), flags=flags)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError):
                pass_on_handlers(error)
            raise LLMException(
                f"cannot reserve {nbytes} bytes for a memory pool: {error}. Configure a smaller "
                "pool, or lift the limit: `ulimit -v`, or sysctl vm.overcommit_memory=2",
                LLMStatusCode.LLM_OUT_OF_MEMORY,
            ) from error
        # transfers by the kernel are an eighth faster on huge pages
        with refusals_ignored():  # a kernel without them
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.addr = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def view(self, addr: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """`nbytes` at an address of the arena; the array keeps the mapping."""
        return np.frombuffer(self._mapping, np.uint8, nbytes, addr - self.addr)

    def close(self) -> None:
        """Gives the memory back; again does nothing. Whoever touches it from now on crashes.

        Where there are views, the last of them gives it back.
        """
        with suppress(BufferError):
            self._mapping.close()


@final
class MemoryPool:
    """Memory to allocate from by address. Thread-safe.

    What new memory holds is not specified: nothing clears it when it is freed. The memory lives
    until `close`.
    """

    def __init__(self, pool: Pool, device: Device) -> None:
        """Reserves what `pool` hands out. Raises LLMException(LLM_OUT_OF_MEMORY)."""
        self._pool = pool
        #: what kind of memory it is
        self.space = device.space
        self._arena = device.reserve(pool.capacity_nbytes)
        self._is_closed = False
        #: guards the pool; not taken by `free` and `close`, which a finalizer may call under it
        self._lock = make_lock()
        self._is_changing = False
        #: what is allocated, and what was freed since the pool was looked at
        self._taken: set[int] = set()
        self._freed: deque[int] = deque()

    @classmethod
    def of_pages(cls, config: PoolConfig, device: Device) -> MemoryPool:
        """A pool of pages. Spec 8.1. Raises LLMException(LLM_OUT_OF_MEMORY)."""
        return cls(PagePool(config.memory_nbytes, config.page_nbytes), device)

    @classmethod
    def of_slots(
        cls, config: BufPoolConfig, mem_pool: PoolConfig | None, device: Device
    ) -> MemoryPool:
        """A pool with size classes, and `mem_pool` for what they have no room for. Spec 8.2.

        Raises LLMException(LLM_OUT_OF_MEMORY).
        """
        return cls(SlotPool(config, mem_pool), device)

    def allocate(self, nbytes: int) -> int:
        """The address of `nbytes` that nobody else has. Raises as `allocate_many` does."""
        with self._changing():
            addr = self._arena.addr + self._pool.allocate(nbytes)
            self._taken.add(addr)
            return addr

    def allocate_many(self, count: int, nbytes: int) -> list[int]:
        """The addresses of `count` pieces of `nbytes` each: all of them or none. Spec 6.3.

        Raises LLMException: LLM_OUT_OF_MEMORY when the pool has no room, with nothing changed, and
        LLM_FAILED when it is closed.
        """
        addrs: list[int] = []
        with self._changing():
            try:
                while len(addrs) < count:
                    addrs.append(self._arena.addr + self._pool.allocate(nbytes))
            except LLMException as error:
                for addr in addrs:
                    self._pool.free(addr - self._arena.addr)
                raise LLMException(
                    f"piece {len(addrs) + 1} of {count}: {error}", error.status_code
                ) from error
            self._taken.update(addrs)
        return addrs

    def free(self, addr: int) -> None:
        """Takes back what was allocated. Raises ValueError for any other address."""
        try:
            self._taken.remove(addr)
        except KeyError:
            raise ValueError(f"nothing is handed out at {addr:#x}") from None
        self._freed.append(addr)

    def view(self, addr: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Allocated memory as an array, which stays readable when the pool is closed.

        Raises LLMException(LLM_FAILED) when it is closed already.
        """
        self._require_open()
        return self._arena.view(addr, nbytes)

    def usage(self) -> tuple[PoolUsage, ...]:
        """How full each part of the pool is."""
        with self._lock:
            if not self._is_changing:  # else a finalizer asks, in the middle of a change
                self._reclaim()
            return self._pool.usage()

    def close(self) -> None:
        """Gives all memory back to the system, what is still allocated included."""
        self._is_closed = True
        self._arena.close()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The pool is changed, in steps that nothing else must come between."""
        with self._lock:
            if self._is_changing:
                raise LLMException(
                    "a finalizer cannot allocate: the pool is in the middle of a change",
                    LLMStatusCode.LLM_FAILED,
                )
            self._is_changing = True
            try:
                self._reclaim()
                self._require_open()
                yield
            finally:
                self._is_changing = False

    def _reclaim(self) -> None:
        while self._freed:
            self._pool.free(self._freed.popleft() - self._arena.addr)

    def _require_open(self) -> None:
        if self._is_closed:
            raise LLMException("the memory pool is closed", LLMStatusCode.LLM_FAILED)
