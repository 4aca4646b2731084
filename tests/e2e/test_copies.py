"""Copies within a process: rows and blocks. Spec 6.8.

Every cache lies in an array that is larger than it, with bytes around it that must stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import framed_memory
import numpy as np
import pytest
from cache_owner import DEVICE, GONE, HOST, INVALID, PAGE, status_of, view
from framed_memory import Framed, Shape, blocks, rows

from llm_datadist import (
    Cache,
    CacheDesc,
    DataType,
    LLMException,
    LLMStatusCode,
    Placement,
)
from llm_datadist.testing.cluster import Node, make_array

if TYPE_CHECKING:
    from collections.abc import Callable


lone = framed_memory.lone


# -- copy_cache ------------------------------------------------------------------------------------


@pytest.mark.shows("cm.copy_cache")
@pytest.mark.parametrize(
    ("offset", "size", "moved"),
    [
        (0, -1, slice(0, 100)),
        (0, 100, slice(0, 100)),
        (0, 1, slice(0, 1)),
        (37, -1, slice(37, 100)),
        (37, 63, slice(37, 100)),
        (37, 20, slice(37, 57)),
        (99, -1, slice(99, 100)),
    ],
)
def test_copy_cache_moves_the_part_of_a_row(
    lone: Node, offset: int, size: int, moved: slice
) -> None:
    src, dst = Framed((3, 4, 100), 1), Framed((3, 2, 120), 2)
    expected = dst.inner.copy()
    expected[:, 1, moved] = src.inner[:, 3, moved]
    lone.manager.copy_cache(rows(lone, dst), rows(lone, src), 1, 3, offset, size)
    assert dst.became(expected)
    assert src.is_untouched()


@pytest.mark.shows("cm.copy_cache")
def test_a_row_is_copied_within_a_cache(lone: Node) -> None:
    frame = Framed((3, 4, 100), 1)
    expected = frame.inner.copy()
    expected[:, 2, 10:40] = expected[:, 0, 10:40]
    cache = rows(lone, frame)
    lone.manager.copy_cache(cache, cache, 2, 0, 10, 30, req_id=2**64 - 1)
    assert frame.became(expected)
    lone.manager.copy_cache(cache, cache, 1, 1)
    assert frame.became(expected)


@pytest.mark.shows("cm.copy_cache")
@pytest.mark.parametrize(
    ("src_at", "dst_at"), [(HOST, DEVICE), (DEVICE, HOST), (HOST, HOST)], ids=str
)
def test_copy_cache_takes_any_placement(lone: Node, src_at: Placement, dst_at: Placement) -> None:
    src, dst = Framed((3, 4, 100), 1), Framed((3, 2, 100), 2)
    expected = dst.inner.copy()
    expected[:, 0] = src.inner[:, 2]
    lone.manager.copy_cache(rows(lone, dst, dst_at), rows(lone, src, src_at), 0, 2)
    assert dst.became(expected)


@pytest.mark.shows("D21")
def test_shapes_and_types_may_differ(lone: Node) -> None:
    src, dst = Framed((2, 2, 96), 1), Framed((2, 4, 100), 2)
    words = CacheDesc(2, (2, 4, 3, 2), DataType.DT_FLOAT)
    cache = lone.manager.register_cache(words, src.addrs, remote_accessible=False)
    expected = dst.inner.copy()
    expected[:, 3, :96] = src.inner[:, 1]
    lone.manager.copy_cache(rows(lone, dst), cache, 3, 1)
    assert dst.became(expected)


def test_a_large_copy_moves_every_byte(lone: Node) -> None:
    src, dst = Framed((3, 2, 5_000_001), 1), Framed((3, 1, 5_000_001), 2)
    lone.manager.copy_cache(rows(lone, dst), rows(lone, src), 0, 1)
    assert dst.became(src.inner[:, 1:])


@pytest.mark.shows("error.54", "D21")
@pytest.mark.parametrize(
    ("src_shape", "dst_shape", "args"),
    [
        ((2, 2, 100), (3, 2, 100), (0, 0)),
        ((2, 2, 100), (2, 2, 100), (2, 0)),
        ((2, 2, 100), (2, 2, 100), (0, 2)),
        ((2, 2, 100), (2, 2, 100), (0, 2**32 - 1)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 100)),
        ((2, 2, 100), (2, 2, 200), (0, 0, 150, 1)),
        ((2, 2, 200), (2, 2, 100), (0, 0, 150, 1)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 2**64 - 1)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 2**64 - 1, 2)),
        ((2, 2, 100), (2, 2, 99), (0, 0)),
        ((2, 2, 100), (2, 2, 200), (0, 0, 0, 101)),
        ((2, 2, 200), (2, 2, 100), (0, 0, 0, 101)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 1, 100)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 0, 2**63 - 1)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 0, 0)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 0, -2)),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    lone: Node, src_shape: Shape, dst_shape: Shape, args: tuple[int, ...]
) -> None:
    src, dst = Framed(src_shape, 1), Framed(dst_shape, 2)
    assert status_of(lone.manager.copy_cache, rows(lone, dst), rows(lone, src), *args) is INVALID
    assert dst.is_untouched()
    assert src.is_untouched()


@pytest.mark.shows("error.39")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"dst_batch_index": -1}, ValueError),
        ({"dst_batch_index": 2**32}, ValueError),
        ({"src_batch_index": "0"}, TypeError),
        ({"src_batch_index": True}, TypeError),
        ({"offset": -1}, ValueError),
        ({"offset": 1.0}, TypeError),
        ({"size": None}, TypeError),
        ({"size": 2**63}, ValueError),
        ({"req_id": -1}, ValueError),
        ({"req_id": "1"}, TypeError),
        ({"dst": None}, AttributeError),
        ({"src": None}, AttributeError),
        ({"dst": 1}, TypeError),
        ({"src": "cache"}, TypeError),
    ],
)
def test_copy_cache_refuses_what_is_no_argument(
    lone: Node, arguments: dict[str, Any], expected: type[Exception]
) -> None:
    src, dst = Framed((2, 2, 100), 1), Framed((2, 2, 100), 2)
    given = {"dst": rows(lone, dst), "src": rows(lone, src), **arguments}
    with pytest.raises(expected):
        lone.manager.copy_cache(**given)
    assert dst.is_untouched()


@pytest.mark.shows("error.55")
def test_blocks_are_not_copied_as_rows_nor_rows_as_blocks(lone: Node) -> None:
    frame = Framed((2, 2, 100), 1)
    cont, paged = rows(lone, frame), blocks(lone, frame)
    assert status_of(lone.manager.copy_cache, paged, cont, 1, 0) is INVALID
    assert status_of(lone.manager.copy_cache, cont, paged, 1, 0) is INVALID
    assert status_of(lone.manager.copy_blocks, cont, {0: [1]}) is INVALID
    assert frame.is_untouched()


@pytest.mark.shows("cm.copy_cache")
@pytest.mark.parametrize("size", [-1, 40])
def test_memory_of_ours_and_of_the_callers_is_copied_both_ways(lone: Node, size: int) -> None:
    frame, desc = Framed((2, 3, 100), 1), CacheDesc(2, [3, 100], DataType.DT_INT8)
    given, ours = rows(lone, frame), lone.manager.allocate_cache(desc)
    moved = slice(20, 60) if size == 40 else slice(20, 100)
    for tensor in view(ours):
        tensor[:] = 0
    lone.manager.copy_cache(ours, given, 2, 1, 20, size)
    expected = np.zeros((2, 3, 100), dtype=np.uint8)
    expected[:, 2, moved] = frame.inner[:, 1, moved]
    assert np.array_equal(np.stack(view(ours)), expected.reshape(2, -1))
    lone.manager.copy_cache(given, ours, 0, 2, 20, size)
    back = Framed((2, 3, 100), 1).inner.copy()
    back[:, 0, moved] = back[:, 1, moved]
    assert frame.became(back)


@pytest.mark.shows("error.54")
def test_a_missing_source_is_found_before_a_missing_destination(lone: Node) -> None:
    gone, also_gone = (rows(lone, Framed((2, 2, 100), seed)) for seed in (1, 2))
    for cache in (gone, also_gone):
        lone.manager.unregister_cache(cache.cache_id)
    with pytest.raises(LLMException, match=rf"no cache {gone.cache_id}\b") as error:
        lone.manager.copy_cache(also_gone, gone, 9, 9, 2**40)  # and before all numbers
    assert error.value.status_code is GONE


@pytest.mark.shows("error.54")
def test_an_unregistered_cache_is_copied_no_more(lone: Node) -> None:
    src, dst = Framed((2, 2, 100), 1), Framed((2, 2, 100), 2)
    gone, kept, paged = rows(lone, src), rows(lone, dst), blocks(lone, dst)
    lone.manager.unregister_cache(gone.cache_id)
    lone.manager.unregister_cache(paged.cache_id)
    assert status_of(lone.manager.copy_cache, kept, gone) is GONE
    assert status_of(lone.manager.copy_cache, gone, kept) is GONE
    assert status_of(lone.manager.copy_blocks, paged, {0: [1]}) is GONE
    assert dst.is_untouched()
    assert src.is_untouched()


# -- copy_blocks -----------------------------------------------------------------------------------


@pytest.mark.shows("cm.copy_blocks")
@pytest.mark.parametrize(
    "copies",
    [
        {0: [1]},
        {0: [9], 9: []},
        {2: [3, 4, 5], 0: [9, 1]},
        {0: [4], 1: [5], 2: [6], 3: [9]},  # a run
        {3: [4], 2: [5], 1: [6], 0: [7]},  # the same backwards
        {9: [0], 8: [1, 3]},
        {4: [4]},
    ],
    ids=str,
)
def test_copy_blocks_copies_each_block_to_its_list(
    lone: Node, copies: dict[int, list[int]]
) -> None:
    frame = Framed((3, 10, 100), 1)
    expected = frame.inner.copy()
    for block, targets in copies.items():
        expected[:, targets] = frame.inner[:, [block]]
    lone.manager.copy_blocks(blocks(lone, frame), copies)
    assert frame.became(expected)


@pytest.mark.shows("cm.copy_blocks", "O18")
@pytest.mark.parametrize("copies", [{}, {0: []}, {3: [], 99: []}], ids=str)
def test_no_copies_are_no_error(lone: Node, copies: dict[int, list[int]]) -> None:
    frame = Framed((3, 10, 100), 1)
    lone.manager.copy_blocks(blocks(lone, frame), copies)
    assert frame.is_untouched()


@pytest.mark.shows("error.54")
@pytest.mark.parametrize(
    "copies",
    [{10: [0]}, {0: [10]}, {0: [1, 10]}, {2**64: [0]}, {0: [2**70]}],
    ids=str,
)
def test_blocks_that_are_not_there_are_refused(lone: Node, copies: dict[int, list[int]]) -> None:
    frame = Framed((3, 10, 100), 1)
    assert status_of(lone.manager.copy_blocks, blocks(lone, frame), copies) is INVALID
    assert frame.is_untouched()


@pytest.mark.parametrize(
    "copies", [{0: 1}, {0: (1,)}, {"0": [1]}, {0: ["1"]}, {0: [None]}, {0: [True]}, [0, 1], None]
)
def test_copy_blocks_refuses_what_is_no_mapping(lone: Node, copies: Any) -> None:
    frame = Framed((3, 10, 100), 1)
    cache = blocks(lone, frame)
    with pytest.raises((TypeError, AttributeError)):
        lone.manager.copy_blocks(cache, copies)
    assert frame.is_untouched()


@pytest.mark.shows("error.54")
@pytest.mark.parametrize("copies", [{-1: [0]}, {0: [-1]}, {0: [1, -1]}, {0: [1], -1: []}], ids=str)
def test_negative_blocks_are_of_the_wrong_type(lone: Node, copies: dict[int, list[int]]) -> None:
    frame = Framed((3, 10, 100), 1)
    cache = blocks(lone, frame)
    with pytest.raises(TypeError, match="cannot be negative"):
        lone.manager.copy_blocks(cache, copies)
    assert frame.is_untouched()


@pytest.mark.shows("error.39")
def test_the_inner_type_is_named(lone: Node) -> None:
    cache = blocks(lone, Framed((3, 10, 100), 1))
    wrong: Any = {0: ["1"]}
    with pytest.raises(TypeError, match="inner type only support"):
        lone.manager.copy_blocks(cache, wrong)
    with pytest.raises(AttributeError):
        lone.manager.copy_blocks(None, {0: [1]})  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        lone.manager.copy_blocks(3, {0: [1]})  # type: ignore[arg-type]


@pytest.mark.shows("cm.copy_blocks")
def test_allocated_blocks_are_copied_among_themselves_alone(lone: Node) -> None:
    desc = CacheDesc(2, [4, PAGE // 4], DataType.DT_INT8)
    before, cache, behind = (lone.manager.allocate_blocks_cache(desc) for _ in range(3))
    for seed, each in enumerate((before, cache, behind)):
        for tensor, data in zip(view(each), make_array((2, PAGE), seed), strict=True):
            tensor[:] = data
    lone.manager.copy_blocks(cache, {0: [3], 1: [2]})
    expected = make_array((2, PAGE), 1).reshape(2, 4, -1)
    expected[:, [3, 2]] = expected[:, [0, 1]]
    assert np.array_equal(view(cache), expected.reshape(2, -1))
    assert np.array_equal(view(before), make_array((2, PAGE), 0))
    assert np.array_equal(view(behind), make_array((2, PAGE), 2))


# -- memory that is not mapped ---------------------------------------------------------------------


def test_unmapped_memory_is_an_error_and_no_crash(lone: Node) -> None:
    mapped = Framed((1, 4, 64), 1)
    desc = CacheDesc(1, [4, 64], DataType.DT_INT8)
    host_desc = CacheDesc(1, [4, 64], DataType.DT_INT8, HOST)
    manager = lone.manager
    good_rows, good_blocks = rows(lone, mapped), blocks(lone, mapped)
    bad_rows = manager.register_cache(desc, [4096])
    bad_blocks = manager.register_blocks_cache(desc, [4096])
    bad_cpu = Cache.create_cpu_cache(host_desc, [4096])
    good_cpu = Cache.create_cpu_cache(host_desc, mapped.addrs)
    expected = mapped.inner.copy()
    calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = [
        (manager.copy_cache, (good_rows, bad_rows)),
        (manager.copy_cache, (bad_rows, good_rows)),
        (manager.copy_cache, (bad_rows, bad_rows, 0, 1)),
        (manager.copy_blocks, (bad_blocks, {0: [1]})),
        (manager.swap_blocks, (bad_cpu, good_blocks, {0: 1})),
        (manager.swap_blocks, (good_blocks, bad_cpu, {0: 1})),
        (manager.swap_blocks, (good_cpu, bad_blocks, {0: 1})),
    ]
    for call, args in calls:
        with pytest.raises(LLMException, match="not mapped") as error:
            call(*args)
        assert error.value.status_code in (INVALID, LLMStatusCode.LLM_FAILED)
    assert mapped.became(expected)
    manager.copy_cache(good_rows, good_rows, 1, 0)
    expected[:, 1] = expected[:, 0]
    assert mapped.became(expected)
