"""memory.arena: memory reserved but not taken, and the pool that threads share. Spec 6.3, 8."""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.memory.arena import Arena, MemoryPool
from llm_datadist.memory.host import unmapped
from llm_datadist.memory.process import ProcessMemory
from llm_datadist.pool_config import BufPoolConfig, PoolConfig, SizeClass
from llm_datadist.running.movers import Movers

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB = 1024
MIB = 1024 * KIB
#: the size in the documents
LARGE = 18737418240
PAGE = 65536
HOST_MEMORY = ProcessMemory(Movers(1))


def resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.fixture
def pool() -> Iterator[MemoryPool]:
    """A pool of four pages of 64 KiB."""
    pool = MemoryPool.of_pages(PoolConfig(4 * PAGE), HOST_MEMORY)
    yield pool
    pool.close()


# -- arena -----------------------------------------------------------------------------------------


def test_18_gigabytes_are_reserved_in_milliseconds_and_none_is_taken() -> None:
    before = resident_nbytes()
    durations_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        arena = Arena(LARGE)
        durations_s.append(time.perf_counter() - start_s)
        assert unmapped([arena.addr], LARGE) == []
        arena.close()
    assert min(durations_s) < 0.05
    assert resident_nbytes() - before < 4 * MIB


def test_an_arena_takes_memory_as_it_is_touched() -> None:
    arena = Arena(LARGE)
    before = resident_nbytes()
    ctypes.memset(arena.addr + LARGE - 8 * MIB, 1, 8 * MIB)
    assert 7 * MIB < resident_nbytes() - before < 12 * MIB
    arena.close()


def test_an_arena_begins_at_a_page_and_can_be_written_to_its_last_byte() -> None:
    arena = Arena(5 * mmap.PAGESIZE + 1)
    assert arena.addr % mmap.PAGESIZE == 0
    ctypes.memset(arena.addr, 7, 5 * mmap.PAGESIZE + 1)
    assert ctypes.string_at(arena.addr + 5 * mmap.PAGESIZE, 1) == b"\x07"
    arena.close()


def test_a_closed_arena_is_not_mapped_and_closes_again() -> None:
    arena = Arena(LARGE)
    arena.close()
    arena.close()
    assert unmapped([arena.addr], LARGE) == [arena.addr]


@pytest.mark.shows("error.9")
@pytest.mark.parametrize("nbytes", [2**50, 2**64 - 1], ids=["address space", "ssize_t"])
def test_what_the_system_cannot_reserve_is_out_of_memory(nbytes: int) -> None:
    with pytest.raises(LLMException, match=f"cannot reserve {nbytes} bytes") as caught:
        Arena(nbytes)
    assert caught.value.status_code is LLMStatusCode.LLM_OUT_OF_MEMORY


# -- memory pool -----------------------------------------------------------------------------------


@pytest.mark.shows("pool.pages")
def test_what_is_allocated_lies_apart_and_can_be_written(pool: MemoryPool) -> None:
    addrs = [pool.allocate(PAGE) for _ in range(4)]
    for value, addr in enumerate(addrs):
        ctypes.memset(addr, value, PAGE)
    for value, addr in enumerate(addrs):
        assert ctypes.string_at(addr, PAGE) == bytes([value]) * PAGE


def test_a_pool_of_256_kib_serves_exactly_four_tensors_of_64_kib(pool: MemoryPool) -> None:
    assert len(set(pool.allocate_many(4, PAGE))) == 4
    with pytest.raises(LLMException) as caught:
        pool.allocate(1)
    assert caught.value.status_code is LLMStatusCode.LLM_OUT_OF_MEMORY


def test_a_pool_of_one_page_does_not_hold_two_small_tensors() -> None:
    pool = MemoryPool.of_pages(PoolConfig(65536), HOST_MEMORY)
    with pytest.raises(LLMException) as caught:
        pool.allocate_many(2, 2048)
    assert caught.value.status_code is LLMStatusCode.LLM_OUT_OF_MEMORY
    assert str(caught.value) == (
        "piece 2 of 2: no room for 2048 bytes (pages: 0 of 65536 bytes free, largest free span 0)"
    )
    pool.close()


def test_all_or_none_of_many_pieces_are_allocated(pool: MemoryPool) -> None:
    kept = pool.allocate(PAGE)
    before = pool.usage()
    with pytest.raises(LLMException):
        pool.allocate_many(4, PAGE)
    assert pool.usage() == before
    addrs = pool.allocate_many(3, PAGE)
    assert len({kept, *addrs}) == 4


def test_no_pieces_are_no_addresses(pool: MemoryPool) -> None:
    assert pool.allocate_many(0, PAGE) == []


def test_what_was_freed_is_handed_out_again(pool: MemoryPool) -> None:
    first = pool.allocate(4 * PAGE)
    pool.free(first)
    assert pool.allocate(4 * PAGE) == first


def test_usage_follows_what_is_handed_out(pool: MemoryPool) -> None:
    pool.allocate(PAGE + 1)
    (usage,) = pool.usage()
    assert (usage.name, usage.capacity_nbytes) == ("pages", 4 * PAGE)
    assert (usage.used_nbytes, usage.free_nbytes, usage.largest_free_nbytes) == (
        2 * PAGE,
        2 * PAGE,
        2 * PAGE,
    )


def test_an_address_that_is_not_the_pools_cannot_be_freed(pool: MemoryPool) -> None:
    addr = pool.allocate(PAGE)
    for wrong in (0, addr + 1, addr - PAGE):
        with pytest.raises(ValueError, match="nothing is handed out"):
            pool.free(wrong)


@pytest.mark.shows("buf_pool.classes")
def test_a_pool_with_classes_serves_from_them_then_in_general_then_from_the_memory_pool() -> None:
    config = BufPoolConfig((SizeClass(2097152, 256, 8192),), 2097152 + PAGE)
    pool = MemoryPool.of_slots(config, PoolConfig(PAGE), HOST_MEMORY)
    pool.allocate(100)
    addrs = pool.allocate_many(2, PAGE)
    assert [each.used_nbytes for each in pool.usage()] == [256, PAGE, PAGE]
    for addr in addrs:
        ctypes.memset(addr, 1, PAGE)
        pool.free(addr)
    assert [each.used_nbytes for each in pool.usage()] == [256, 0, 0]
    pool.close()


def test_a_tiny_pool_without_classes_opens_and_has_no_room() -> None:
    pool = MemoryPool.of_slots(BufPoolConfig((), 1024), None, HOST_MEMORY)
    with pytest.raises(LLMException) as caught:
        pool.allocate(1)
    assert caught.value.status_code is LLMStatusCode.LLM_OUT_OF_MEMORY
    pool.close()


@pytest.mark.shows("error.9")
def test_a_pool_that_the_system_cannot_hold_is_out_of_memory() -> None:
    with pytest.raises(LLMException) as caught:
        MemoryPool.of_pages(PoolConfig(2**60, 30), HOST_MEMORY)
    assert caught.value.status_code is LLMStatusCode.LLM_OUT_OF_MEMORY


def test_a_closed_pool_gives_its_memory_back() -> None:
    pool = MemoryPool.of_pages(PoolConfig(LARGE), HOST_MEMORY)
    addr = pool.allocate(MIB)
    assert unmapped([addr], MIB) == []
    pool.close()
    assert unmapped([addr], MIB) == [addr]


def test_a_closed_pool_allocates_nothing_and_takes_back_what_is_still_out() -> None:
    pool = MemoryPool.of_pages(PoolConfig(PAGE), HOST_MEMORY)
    addr = pool.allocate(1)
    pool.close()
    pool.close()
    pool.free(addr)
    for count in (1, 2):
        with pytest.raises(LLMException, match="the memory pool is closed") as caught:
            pool.allocate_many(count, 1)
        assert caught.value.status_code is LLMStatusCode.LLM_FAILED


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("eager_switches")
def test_eight_threads_never_get_the_same_memory() -> None:
    pool = MemoryPool.of_pages(PoolConfig(64 * KIB, 10), HOST_MEMORY)
    everyone = threading.Barrier(8)

    def work(worker: int) -> int:
        rng = random.Random(worker)
        everyone.wait()
        served = 0
        for _ in range(400):
            count, nbytes = rng.randint(1, 4), rng.randint(1, 4 * KIB)
            try:
                addrs = pool.allocate_many(count, nbytes)
            except LLMException:  # the others hold it all
                continue
            for addr in addrs:
                ctypes.memset(addr, worker, nbytes)
            for addr in addrs:
                assert ctypes.string_at(addr, nbytes) == bytes([worker]) * nbytes
                pool.free(addr)
            served += count
        return served

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(work, range(8))) > 0
    (usage,) = pool.usage()
    assert usage.largest_free_nbytes == usage.capacity_nbytes
    pool.close()
