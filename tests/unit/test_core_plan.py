"""core.plan by example: refusals, the spec's example, and what a plan costs. Spec 6.9, 6.10."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist.core import plan
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.layers import PulledLayers
from llm_datadist.core.segments import AT_ONCE
from llm_datadist.core.tiled import Tiled
from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from llm_datadist.core.segments import Segments

SRC, DST = 2**40, 2**41


def make_layout(
    base: int, rows: int, row_nbytes: int, *, tensors: int = 1, kind: CacheKind = CacheKind.MIX
) -> Layout:
    """Tensors one mebibyte apart."""
    geometry = Geometry(kind, tensors, rows, row_nbytes)
    return Layout.at(geometry, [base + index * 2**20 for index in range(tensors)])


def moves(pieces: Segments | Tiled) -> list[tuple[int, int, int]]:
    """Offset in the source, offset in the destination, length."""
    segments = pieces.flat()
    return [
        (src - SRC, dst - DST, nbytes)
        for src, dst, nbytes in zip(
            segments.src.tolist(), segments.dst.tolist(), segments.nbytes.tolist(), strict=True
        )
    ]


def assert_refused(
    match: str, call: Callable[..., object], *args: object, **kwargs: object
) -> None:
    with pytest.raises(LLMException, match=match) as caught:
        call(*args, **kwargs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


# -- examples --


def test_the_example_of_the_spec_spreads_28_bytes_over_four_blocks_of_8() -> None:
    segments = plan.row_to_blocks(make_layout(SRC, 1, 28), 0, make_layout(DST, 8, 8), [1, 3, 5, 7])
    assert moves(segments) == [(0, 8, 8), (8, 24, 8), (16, 40, 8), (24, 56, 4)]


def test_the_last_of_fewer_blocks_than_a_row_fills_is_filled_whole() -> None:
    segments = plan.row_to_blocks(make_layout(SRC, 1, 28), 0, make_layout(DST, 8, 8), [5, 1])
    assert moves(segments) == [(0, 40, 8), (8, 8, 8)]


def test_the_tail_is_that_of_the_row_and_not_of_the_tensor() -> None:
    segments = plan.row_to_blocks(make_layout(SRC, 3, 28), 1, make_layout(DST, 8, 8), [0, 2, 4, 6])
    assert moves(segments)[-1] == (28 + 24, 48, 4)


def test_tensors_one_behind_the_other_are_a_segment_each() -> None:
    geometry = Geometry(CacheKind.CONTINUOUS, 4, 1, 64)
    src = Layout.at(geometry, [SRC + 64 * index for index in range(4)])
    dst = Layout.at(geometry, [DST + 64 * index for index in range(4)])
    assert moves(plan.row_to_row(src, 0, dst, 0, 64)) == [(at, at, 64) for at in range(0, 256, 64)]
    dst = Layout.at(Geometry(CacheKind.BLOCKS, 4, 2, 32), dst.addrs.tolist())
    halves = plan.row_to_blocks(src, 0, dst, [0, 1])
    assert moves(halves) == [(at, at, 64) for at in range(0, 256, 64)]


def test_tensors_that_lie_one_behind_the_other_at_one_end_only_stay_apart() -> None:
    geometry = Geometry(CacheKind.CONTINUOUS, 2, 1, 64)
    src = Layout.at(geometry, [SRC, SRC + 64])
    dst = Layout.at(geometry, [DST, DST + 65])
    assert moves(plan.row_to_row(src, 0, dst, 0, 64)) == [(0, 0, 64), (64, 65, 64)]


def test_blocks_named_backwards_on_both_sides_are_one_segment() -> None:
    layouts = make_layout(SRC, 8, 16), make_layout(DST, 8, 16)
    segments = plan.blocks_to_blocks(layouts[0], [5, 4, 3], layouts[1], [3, 2, 1])
    assert moves(segments) == [(48, 16, 48)]


def test_blocks_that_are_reversed_on_the_way_stay_apart() -> None:
    layouts = make_layout(SRC, 8, 16), make_layout(DST, 8, 16)
    segments = plan.blocks_to_blocks(layouts[0], [0, 1, 2], layouts[1], [2, 1, 0])
    assert sorted(moves(segments)) == [(0, 32, 16), (16, 16, 16), (32, 0, 16)]


def test_block_indices_beyond_32_bits_of_bytes_are_exact() -> None:
    geometry = Geometry(CacheKind.BLOCKS, 1, 2**20, 2**20)
    layouts = Layout.at(geometry, [SRC]), Layout.at(geometry, [DST])
    segments = plan.blocks_to_blocks(layouts[0], [2**20 - 1], layouts[1], [2**19])
    assert moves(segments) == [((2**20 - 1) * 2**20, 2**39, 2**20)]


def test_a_range_without_layers_is_no_range() -> None:
    assert PulledLayers.of(range(0), range(0), 2) == PulledLayers(None, None, 2)


def test_layers_are_that_many_tensors_each() -> None:
    assert PulledLayers.of(range(2, 4), None, 3).src == range(6, 12)


# -- refusals --


def test_blocks_of_unequal_size_are_refused() -> None:
    layouts = make_layout(SRC, 8, 16), make_layout(DST, 8, 8)
    assert_refused(
        "source blocks have 16 bytes, destination blocks 8",
        plan.blocks_to_blocks, layouts[0], [0], layouts[1], [0],
    )  # fmt: skip


def test_blocks_larger_than_the_row_are_refused() -> None:
    layouts = make_layout(SRC, 1, 7), make_layout(DST, 8, 8)
    assert_refused("block of 8 bytes", plan.row_to_blocks, layouts[0], 0, layouts[1], [0])


def test_more_blocks_than_the_row_fills_are_refused() -> None:
    layouts = make_layout(SRC, 4, 28), make_layout(DST, 8, 8)
    assert_refused("5 blocks", plan.row_to_blocks, layouts[0], 0, layouts[1], [0, 1, 2, 3, 4])


@pytest.mark.parametrize("blocks", [[8], [-1], [0, 8], [-1, 7], [2**64]])
def test_blocks_that_are_not_there_are_refused(blocks: list[int]) -> None:
    geometry = Geometry(CacheKind.BLOCKS, 1, 8, 16)
    assert_refused("out of range", plan.check_blocks, geometry, blocks, "source")


def test_blocks_of_a_cache_that_has_none_are_refused() -> None:
    geometry = Geometry(CacheKind.CONTINUOUS, 1, 8, 16)
    assert_refused("no blocks cache", plan.check_blocks, geometry, [0], "destination")


def test_rows_of_a_blocks_cache_are_refused() -> None:
    geometry = Geometry(CacheKind.BLOCKS, 1, 8, 16)
    assert_refused("is a blocks cache", plan.check_batch_rows, geometry, 1, "source")


def test_more_bytes_than_a_row_has_are_refused() -> None:
    geometry = Geometry(CacheKind.CONTINUOUS, 1, 8, 16)
    assert_refused("17 bytes", plan.check_batch_rows, geometry, 17, "source")


@pytest.mark.parametrize(
    ("src", "dst", "per_layer", "match"),
    [
        (range(3), None, 3, "no whole layers"),
        (None, range(4, 5), 2, "dst_layer_range reaches tensor 9"),
        (None, range(8, 9), 1, "dst_layer_range reaches tensor 8, the local cache has 8"),
        (range(2), range(1), 2, "src_layer_range has 4 tensors, the destination 2"),
        (range(3), None, 2, "src_layer_range has 6 tensors, the destination 8"),
    ],
)
def test_layer_ranges_that_do_not_fit_the_pullers_cache_are_refused(
    src: range | None, dst: range | None, per_layer: int, match: str
) -> None:
    local = Geometry(CacheKind.CONTINUOUS, 8, 1, 16)
    assert_refused(match, PulledLayers.of(src, dst, per_layer).check, local)


@pytest.mark.parametrize(
    ("src", "dst", "match"),
    [
        (range(7, 9), range(2), "src_layer_range reaches tensor 8, the remote cache has 8"),
        (range(8, 10), range(2), "src_layer_range reaches tensor 9, the remote cache has 8"),
        (None, range(2), "8 remote tensors for 2 local ones"),
        (None, None, "8 remote tensors for 6 local ones"),
    ],
)
def test_layer_ranges_that_do_not_fit_the_owners_cache_are_refused(
    src: range | None, dst: range | None, match: str
) -> None:
    remote, local = make_layout(SRC, 1, 16, tensors=8), make_layout(DST, 1, 16, tensors=6)
    assert_refused(match, PulledLayers(src, dst).select, remote, local)


def test_a_number_of_tensors_per_layer_does_not_matter_without_ranges() -> None:
    local = Geometry(CacheKind.CONTINUOUS, 7, 1, 16)
    layers = PulledLayers(None, None, 100)
    layers.check(local)
    remote = make_layout(SRC, 1, 16, tensors=7)
    layouts = layers.select(remote, make_layout(DST, 1, 16, tensors=7))
    assert [len(layout.addrs) for layout in layouts] == [7, 7]


# -- what a plan costs --


def steps_of(call: Callable[[], object]) -> int:
    """How many bytecode instructions a call runs, in our code and below it."""
    steps = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return trace

    former = sys.gettrace()
    gc.disable()  # hypothesis has a callback in Python for each collection
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(former)
        gc.enable()
    return steps


def scattered(count: int) -> list[int]:
    """Blocks of which no two are neighbours."""
    return [2 * int(block) for block in np.random.default_rng(count).permutation(count)]


@pytest.mark.parametrize("tensors", [1, 64])
def test_no_instruction_of_a_plan_runs_once_per_block(tensors: int) -> None:
    def plan_blocks(blocks: list[int]) -> None:
        count = len(blocks)
        src, dst = (make_layout(base, 2 * count, 16, tensors=tensors) for base in (SRC, DST))
        row = make_layout(SRC, 1, 16 * count, tensors=tensors)
        plan.check_blocks(src.geometry, blocks, "source")
        plan.blocks_to_blocks(src, blocks, dst, blocks[::-1])
        plan.row_to_blocks(row, 0, dst, blocks)

    few, many = scattered(400), scattered(4000)  # of 64 tensors not listed at once
    steps_of(lambda: plan_blocks(few))  # what is only done once; 3.12.1 counts from then on
    assert steps_of(lambda: plan_blocks(many)) == steps_of(lambda: plan_blocks(few))


def test_scattered_blocks_make_one_segment_per_block_and_tensor() -> None:
    layouts = [make_layout(base, 512, 32, tensors=64) for base in (SRC, DST)]
    segments = plan.blocks_to_blocks(layouts[0], scattered(256), layouts[1], scattered(256)[::-1])
    assert len(segments) == 64 * 256
    assert segments.total_nbytes == 64 * 256 * 32


@pytest.mark.parametrize("parts", [1, 2, 3, 16])
@pytest.mark.parametrize("count", [1, 300, 5000])
def test_parts_and_windows_of_a_plan_are_all_of_it(count: int, parts: int) -> None:
    layouts = [make_layout(base, 16384, 32, tensors=40) for base in (SRC, DST)]
    blocks = scattered(count)
    planned = plan.blocks_to_blocks(layouts[0], blocks, layouts[1], blocks[::-1])
    assert isinstance(planned, Tiled) == (40 * count > AT_ONCE)
    assert len(planned) == 40 * count
    assert planned.total_nbytes == 40 * count * 32
    cut = planned.split(parts)
    assert len(cut) == min(parts, 40 * count)
    assert max(part.total_nbytes for part in cut) <= planned.total_nbytes / parts * 1.2 + 32
    windows = [window for part in cut for window in part.bounded(20).windows(1000, 9000)]
    assert max(map(len, windows)) <= 9000 // 20
    found = [move for window in windows for move in moves(window)]
    assert len(set(found)) == len(found)
    assert set(found) == {
        (tensor * 2**20 + src * 32 + at, tensor * 2**20 + dst * 32 + at, nbytes)
        for tensor in range(40)
        for src, dst in zip(blocks, blocks[::-1], strict=True)
        for at, nbytes in ((0, 20), (20, 12))
    }
