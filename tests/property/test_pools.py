"""core.pages and core.slots against a list with one entry a page. Spec 7.2, 8.1, 8.2."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from llm_datadist.core.pages import PagePool, PoolUsage
from llm_datadist.core.slots import GENERAL_PAGE_NBYTES, SlotPool
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.pool_config import BufPoolConfig, PoolConfig, SizeClass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.pages import Pool

KIB = 1024
MIB = 1024 * KIB

machine_settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


@dataclass
class NaivePages:
    """The rules of spec 8.1, said as plainly as can be: a list of pages, walked each time."""

    capacity_nbytes: int
    page_nbytes: int
    is_used: list[bool] = field(init=False)
    handed_out: dict[int, int] = field(default_factory=dict)  #: first page -> pages

    def __post_init__(self) -> None:
        self.is_used = [False] * (self.capacity_nbytes // self.page_nbytes)

    def free_runs(self) -> list[range]:
        """Runs of free pages as long as can be, in the order of the pages."""
        runs = (list(run) for _, run in groupby(enumerate(self.is_used), key=lambda at: at[1]))
        return [range(run[0][0], run[-1][0] + 1) for run in runs if not run[0][1]]

    def allocate(self, nbytes: int) -> int | None:
        """The offset; None when there is no room."""
        count = max(1, -(-nbytes // self.page_nbytes))
        fitting = [run for run in self.free_runs() if len(run) >= count]
        if not fitting:
            return None
        first = min(fitting, key=len).stop - count
        self.is_used[first : first + count] = [True] * count
        self.handed_out[first] = count
        return first * self.page_nbytes

    def free(self, offset: int) -> None:
        first = offset // self.page_nbytes
        count = self.handed_out.pop(first)
        self.is_used[first : first + count] = [False] * count

    def usage(self, name: str) -> PoolUsage:
        page = self.page_nbytes
        used = sum(self.is_used) * page
        largest = max(map(len, self.free_runs()), default=0) * page
        capacity = len(self.is_used) * page
        return PoolUsage(name, capacity, capacity - used, used, largest)


def assert_out_of_memory(pool: Pool, nbytes: int) -> str:
    """What the refusal says."""
    before = pool.usage()
    with pytest.raises(LLMException) as caught:
        pool.allocate(nbytes)
    assert caught.value.status_code is LLMStatusCode.LLM_OUT_OF_MEMORY
    assert pool.usage() == before
    return str(caught.value)


def assert_apart(spans: dict[int, int], capacity_nbytes: int) -> None:
    """Spans, offset -> nbytes, neither overlap nor leave the memory."""
    bounds = sorted((offset, offset + nbytes) for offset, nbytes in spans.items())
    assert all(former[1] <= latter[0] for former, latter in pairwise(bounds))
    assert not bounds or (bounds[0][0] >= 0 and bounds[-1][1] <= capacity_nbytes)


def assert_totals_are_those_of_the_parts(pool: Pool) -> None:
    usage = pool.usage()
    assert pool.capacity_nbytes == sum(each.capacity_nbytes for each in usage)
    assert pool.free_nbytes == sum(each.free_nbytes for each in usage)
    assert pool.used_nbytes == sum(each.used_nbytes for each in usage)


# -- pages -----------------------------------------------------------------------------------------


class PagePoolMachine(RuleBasedStateMachine):
    """The pool hands out exactly the offsets that the naive one does."""

    held = Bundle("held")

    @initialize(
        num_pages=st.integers(1, 40), page_nbytes=st.sampled_from([1, 8, 1024]), data=st.data()
    )
    def start(self, num_pages: int, page_nbytes: int, data: st.DataObject) -> None:
        fraction = data.draw(st.integers(0, page_nbytes - 1))
        self.page_nbytes = page_nbytes
        self.pool = PagePool(num_pages * page_nbytes + fraction, page_nbytes)
        self.naive = NaivePages(num_pages * page_nbytes, page_nbytes)
        self.spans: dict[int, int] = {}
        assert self.pool.largest_free_nbytes == num_pages * page_nbytes

    @rule(target=held, num_pages=st.integers(0, 12), less=st.integers(0, 1023))
    def allocate(self, num_pages: int, less: int) -> object:
        nbytes = max(0, num_pages * self.page_nbytes - less % self.page_nbytes)
        expected = self.naive.allocate(nbytes)
        assert self.pool.can_allocate(nbytes) is (expected is not None)
        if expected is None:
            assert_out_of_memory(self.pool, nbytes)
            return multiple()
        assert self.pool.allocate(nbytes) == expected
        assert expected % self.page_nbytes == 0
        self.spans[expected] = max(1, nbytes)
        return expected

    @rule(offset=consumes(held))
    def free(self, offset: int) -> None:
        self.pool.free(offset)
        self.naive.free(offset)
        del self.spans[offset]

    @rule(offset=st.integers(-1, 40 * 8))
    def free_what_nobody_holds(self, offset: int) -> None:
        if offset not in self.spans:
            with pytest.raises(ValueError, match=f"nothing is handed out at offset {offset}"):
                self.pool.free(offset)

    @invariant()
    def the_books_are_right(self) -> None:
        assert self.pool.usage() == (self.naive.usage("pages"),)
        assert_totals_are_those_of_the_parts(self.pool)
        assert_apart(self.spans, self.pool.capacity_nbytes)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for offset in self.spans:
                self.pool.free(offset)
            assert self.pool.largest_free_nbytes == self.pool.capacity_nbytes


TestPagePool = pytest.mark.shows("pool.pages")(PagePoolMachine.TestCase)
TestPagePool.settings = machine_settings


def allocate_all(pool: Pool, sizes: Sequence[int]) -> list[int]:
    return [pool.allocate(nbytes) for nbytes in sizes]


@pytest.mark.shows("pool.pages")
@given(st.lists(st.integers(1, 5000), max_size=60), st.data())
@settings(deadline=None)
def test_freed_in_any_order_all_becomes_one_span_again(
    sizes: list[int], data: st.DataObject
) -> None:
    pool = PagePool(512 * KIB, KIB)
    offsets = allocate_all(pool, sizes)
    for offset in data.draw(st.permutations(offsets)):
        pool.free(offset)
    assert pool.allocate(pool.capacity_nbytes) == 0


def test_a_pool_of_256_kib_serves_exactly_four_tensors_of_64_kib() -> None:
    pool = PagePool(262144, 65536)
    assert sorted(allocate_all(pool, [65536] * 4)) == [0, 65536, 131072, 196608]
    assert_out_of_memory(pool, 1)


def test_a_pool_of_one_page_does_not_hold_two_small_tensors() -> None:
    pool = PagePool(65536, 65536)
    pool.allocate(2048)
    assert_out_of_memory(pool, 2048)


@pytest.mark.shows("pool.pages")
def test_ten_requests_of_32_kib_fill_640_kib_of_64_kib_pages() -> None:
    pool = PagePool(655360, 65536)
    allocate_all(pool, [32 * KIB] * 10)
    assert (pool.free_nbytes, pool.used_nbytes) == (0, 655360)
    assert_out_of_memory(pool, 32 * KIB)


def test_a_trailing_fraction_of_a_page_is_never_used() -> None:
    pool = PagePool(102428800, 65536)
    assert pool.capacity_nbytes == 1562 * 65536
    assert_out_of_memory(pool, 102428800)
    allocate_all(pool, [1] * 1562)
    assert pool.free_nbytes == 0


def test_less_than_a_page_is_a_pool_without_room() -> None:
    pool = PagePool(1023, 1024)
    assert pool.capacity_nbytes == 0
    assert_out_of_memory(pool, 1)


@pytest.mark.shows("pool.pages")
def test_a_large_span_is_split_at_its_tail() -> None:
    pool = PagePool(10 * KIB, KIB)
    assert pool.allocate(3 * KIB) == 7 * KIB


@pytest.mark.shows("pool.pages")
def test_an_exact_fit_is_preferred_to_a_larger_span_before_it() -> None:
    pool = PagePool(10 * KIB, KIB)
    wall, hole, floor = allocate_all(pool, [KIB, 2 * KIB, KIB])
    pool.free(hole)
    assert pool.allocate(2 * KIB) == hole
    assert wall > hole > floor


def test_enough_bytes_in_pieces_are_no_room() -> None:
    pool = PagePool(4 * KIB, KIB)
    offsets = sorted(allocate_all(pool, [KIB] * 4))
    pool.free(offsets[0])
    pool.free(offsets[2])
    message = assert_out_of_memory(pool, 2 * KIB)
    assert message == (
        "no room for 2048 bytes (pages: 2048 of 4096 bytes free, largest free span 1024)"
    )


def test_what_was_freed_once_cannot_be_freed_again() -> None:
    pool = PagePool(4 * KIB, KIB)
    offset = pool.allocate(1)
    pool.free(offset)
    with pytest.raises(ValueError, match=f"nothing is handed out at offset {offset} of pages"):
        pool.free(offset)


def test_a_pool_of_exabytes_costs_nothing_up_front() -> None:
    pool = PagePool(2**60, KIB)
    assert pool.allocate(1) == 2**60 - KIB


# -- size classes ----------------------------------------------------------------------------------

#: what the seed's example says
DOCUMENTED = BufPoolConfig((SizeClass(2097152, 256, 8192),), 2147483648)

#: few slots in each class, so that they run out; the sizes are no multiples of the slots
CLASSES = (
    SizeClass(2 * MIB, 256 * KIB, 300 * KIB),
    SizeClass(2 * MIB, 512 * KIB, 513 * KIB),
    SizeClass(4 * MIB, 512 * KIB, 2 * MIB),
)


class SlotPoolMachine(RuleBasedStateMachine):
    """The pool does what a row of naive pools does."""

    held = Bundle("held")

    @initialize(
        num_classes=st.integers(0, 3),
        pool_nbytes=st.none() | st.integers(0, 12 * MIB),
        mem_pool=st.none() | st.builds(PoolConfig, st.integers(MIB, 2 * MIB), st.integers(18, 20)),
    )
    def start(self, num_classes: int, pool_nbytes: int | None, mem_pool: PoolConfig | None) -> None:
        self.classes = CLASSES[:num_classes]
        self.pool = SlotPool(BufPoolConfig(self.classes, pool_nbytes), mem_pool)
        self.naive = {
            f"class {each.max_nbytes}": NaivePages(each.total_nbytes, each.block_nbytes)
            for each in self.classes
        }
        rest = (pool_nbytes or 0) - sum(each.total_nbytes for each in self.classes)
        self.naive["general"] = NaivePages(max(0, rest), GENERAL_PAGE_NBYTES)
        if mem_pool is not None:
            self.naive["mem_pool"] = NaivePages(mem_pool.memory_nbytes, mem_pool.page_nbytes)
        self.spans: dict[int, int] = {}
        self.parts: dict[int, tuple[str, int]] = {}  #: offset -> part, and offset in it

    def parts_for(self, nbytes: int) -> list[str]:
        own = [f"class {each.max_nbytes}" for each in self.classes if nbytes <= each.max_nbytes]
        return own[:1] + [name for name in self.naive if not name.startswith("class")]

    def base(self, name: str) -> int:
        names = list(self.naive)
        before = names[: names.index(name)]
        return sum(self.naive[each].usage(each).capacity_nbytes for each in before)

    @rule(target=held, nbytes=st.integers(0, 3 * MIB) | st.integers(0, 600 * KIB))
    def allocate(self, nbytes: int) -> object:
        for name in self.parts_for(nbytes):
            expected = self.naive[name].allocate(nbytes)
            if expected is not None:
                offset = self.pool.allocate(nbytes)
                assert offset == self.base(name) + expected
                self.spans[offset] = max(1, nbytes)
                self.parts[offset] = name, expected
                return offset
        message = assert_out_of_memory(self.pool, nbytes)
        assert all(f"{name}: " in message for name in self.parts_for(nbytes))
        return multiple()

    @rule(offset=consumes(held))
    def free(self, offset: int) -> None:
        self.pool.free(offset)
        name, naive_offset = self.parts.pop(offset)
        self.naive[name].free(naive_offset)
        del self.spans[offset]

    @rule(offset=st.integers(-1, 20 * MIB))
    def free_what_nobody_holds(self, offset: int) -> None:
        if offset not in self.spans:
            with pytest.raises(ValueError, match=f"nothing is handed out at offset {offset}"):
                self.pool.free(offset)

    @invariant()
    def the_books_are_right(self) -> None:
        assert self.pool.usage() == tuple(p.usage(name) for name, p in self.naive.items())
        assert_totals_are_those_of_the_parts(self.pool)
        assert_apart(self.spans, self.pool.capacity_nbytes)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for offset in self.spans:
                self.pool.free(offset)
            for each in self.pool.usage():
                assert each.free_nbytes == each.largest_free_nbytes == each.capacity_nbytes


TestSlotPool = pytest.mark.shows("buf_pool.classes")(SlotPoolMachine.TestCase)
TestSlotPool.settings = machine_settings


def used(pool: SlotPool) -> dict[str, int]:
    return {each.name: each.used_nbytes for each in pool.usage()}


@pytest.mark.shows("buf_pool.classes")
def test_the_documented_class_serves_small_requests_in_slots_of_256_bytes() -> None:
    pool = SlotPool(DOCUMENTED)
    allocate_all(pool, [1, 256, 257, 8192])
    assert used(pool) == {"class 8192": 256 + 256 + 512 + 8192, "general": 0}


def test_the_documented_pool_has_in_general_what_its_class_leaves() -> None:
    pool = SlotPool(DOCUMENTED)
    assert pool.capacity_nbytes == 2147483648
    assert [each.capacity_nbytes for each in pool.usage()] == [2097152, 2147483648 - 2097152]


@pytest.mark.shows("buf_pool.classes")
def test_a_request_over_every_class_takes_general_pages() -> None:
    pool = SlotPool(DOCUMENTED)
    pool.allocate(8193)
    assert used(pool) == {"class 8192": 0, "general": 65536}


@pytest.mark.shows("buf_pool.classes")
def test_what_the_documented_class_has_no_room_for_takes_general_pages() -> None:
    pool = SlotPool(DOCUMENTED)
    allocate_all(pool, [8192] * 256)
    assert used(pool) == {"class 8192": 2097152, "general": 0}
    pool.allocate(256)
    assert used(pool) == {"class 8192": 2097152, "general": 65536}


@pytest.mark.shows("buf_pool.classes")
def test_a_full_class_leaves_the_next_larger_one_alone() -> None:
    pool = SlotPool(BufPoolConfig(CLASSES, None))
    allocate_all(pool, [256 * KIB] * 8)
    message = assert_out_of_memory(pool, 256 * KIB)
    assert message == (
        "no room for 262144 bytes (class 307200: 0 of 2097152 bytes free, largest free span 0; "
        "general: 0 of 0 bytes free, largest free span 0)"
    )
    assert used(pool)["class 525312"] == 0


def test_a_slot_that_is_free_again_comes_before_the_general_pool() -> None:
    pool = SlotPool(DOCUMENTED)
    offsets = allocate_all(pool, [8192] * 257)
    pool.free(offsets[100])
    assert pool.allocate(8192) == offsets[100]


def test_the_memory_pool_is_the_last_resort() -> None:
    config = BufPoolConfig(DOCUMENTED.classes, 2097152 + 65536)
    pool = SlotPool(config, PoolConfig(2 * 65536))
    allocate_all(pool, [65536] * 2)
    assert used(pool) == {"class 8192": 0, "general": 65536, "mem_pool": 65536}
    assert_out_of_memory(pool, 65537)


@pytest.mark.parametrize("pool_nbytes", [None, 0, 1024, 2097152])
def test_a_pool_no_larger_than_its_classes_has_them_whole_and_no_more(
    pool_nbytes: int | None,
) -> None:
    pool = SlotPool(BufPoolConfig(DOCUMENTED.classes, pool_nbytes))
    assert [each.capacity_nbytes for each in pool.usage()] == [2097152, 0]
    assert_out_of_memory(pool, 8193)


def test_a_tiny_pool_without_classes_has_no_room() -> None:
    assert_out_of_memory(SlotPool(BufPoolConfig((), 1024)), 1)
