"""core.plan against the naive copy: exactly the bytes asked for move. Spec 6.8-6.10."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_model import (
    BLOCK_KINDS,
    ROW_KINDS,
    Memory,
    distinct_blocks,
    execute,
    memories,
)

from llm_datadist.core import plan
from llm_datadist.core.geometry import CacheKind, Geometry
from llm_datadist.core.layers import PulledLayers
from llm_datadist.core.segments import Segments
from llm_datadist.core.transfer import CopyRow
from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


examples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

sizes = st.integers(1, 9)
tensor_counts = st.integers(1, 5)


def assert_moves(segments: Segments, source: Memory, destination: Memory, expected: Memory) -> None:
    moved = destination.copy()
    execute(segments, source, moved)
    np.testing.assert_array_equal(moved.cells, expected.cells)


# -- blocks to blocks --


@st.composite
def block_copies(draw: st.DrawFn) -> tuple[Memory, list[int], Memory, list[int]]:
    """Two caches of equal blocks, and pairs of blocks; a source may be named more than once."""
    block, tensors = draw(sizes), draw(tensor_counts)
    src_rows, dst_rows = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    kinds = st.sampled_from(BLOCK_KINDS)
    source = draw(memories(Geometry(draw(kinds), tensors, src_rows, block)))
    geometry = Geometry(draw(kinds), tensors, dst_rows, block)
    destination = draw(memories(geometry, is_destination=True))
    dst_blocks = draw(distinct_blocks(dst_rows, dst_rows))
    size = len(dst_blocks)
    any_blocks = st.lists(st.integers(0, src_rows - 1), min_size=size, max_size=size)
    shapes = [any_blocks]
    if src_rows >= size:
        shapes.append(distinct_blocks(src_rows, size).filter(lambda blocks: len(blocks) == size))
        shapes.append(st.just(list(range(size))))
        shapes.append(st.just(list(range(src_rows - size, src_rows))[::-1]))
    return source, draw(st.one_of(shapes)), destination, dst_blocks


@pytest.mark.shows("cm.pull_blocks")
@examples
@given(block_copies())
def test_every_block_named_gets_the_bytes_of_its_source_and_nothing_else_changes(
    copy: tuple[Memory, list[int], Memory, list[int]],
) -> None:
    source, src_blocks, destination, dst_blocks = copy
    expected = destination.copy()
    for tensor in range(source.geometry.num_tensors):
        for src, dst in zip(src_blocks, dst_blocks, strict=True):
            expected.row(tensor, dst)[:] = source.row(tensor, src)
    plan.check_blocks(source.geometry, src_blocks, "source")
    plan.check_blocks(destination.geometry, dst_blocks, "destination")
    segments = plan.blocks_to_blocks(source.layout, src_blocks, destination.layout, dst_blocks)
    assert isinstance(segments, Segments)
    assert_moves(segments, source, destination, expected)


@examples
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12),
    data=st.data(),
)
def test_a_destination_block_that_is_named_twice_ends_as_one_of_its_sources(
    pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    geometry = Geometry(CacheKind.BLOCKS, 2, 6, 3)
    source = data.draw(memories(geometry))
    destination = data.draw(memories(geometry, is_destination=True))
    segments = plan.blocks_to_blocks(
        source.layout, [src for src, _ in pairs], destination.layout, [dst for _, dst in pairs]
    )
    assert isinstance(segments, Segments)
    execute(segments, source, destination)
    for tensor in range(geometry.num_tensors):
        for dst in {dst for _, dst in pairs}:
            candidates = [source.row(tensor, src).tolist() for src, to in pairs if to == dst]
            assert destination.row(tensor, dst).tolist() in candidates


@st.composite
def apart_block_copies(draw: st.DrawFn) -> tuple[Memory, list[int], Memory, list[int]]:
    """Pairs of distinct blocks, of caches whose tensors do not touch."""
    rows, tensors = draw(st.integers(1, 12)), draw(tensor_counts)
    geometry = Geometry(CacheKind.BLOCKS, tensors, rows, draw(sizes))
    source = draw(memories(geometry, min_gap=1))
    destination = draw(memories(geometry, is_destination=True, min_gap=1))
    src_blocks = draw(distinct_blocks(rows, rows))
    size = len(src_blocks)
    dst_blocks = draw(st.permutations(range(rows)).map(lambda blocks: list(blocks[:size])))
    if draw(st.booleans()):
        dst_blocks = src_blocks
    return source, src_blocks, destination, dst_blocks


@pytest.mark.shows("cm.pull_blocks")
@examples
@given(apart_block_copies())
def test_runs_of_blocks_become_one_segment_per_tensor_in_whatever_order_they_are_named(
    copy: tuple[Memory, list[int], Memory, list[int]],
) -> None:
    source, src_blocks, destination, dst_blocks = copy
    pairs = set(zip(src_blocks, dst_blocks, strict=True))
    runs = sum((src - 1, dst - 1) not in pairs for src, dst in pairs)
    segments = plan.blocks_to_blocks(source.layout, src_blocks, destination.layout, dst_blocks)
    assert len(segments) == runs * source.geometry.num_tensors


any_geometry = st.builds(
    Geometry, st.sampled_from(CacheKind), tensor_counts, st.integers(1, 8), sizes
)


def is_accepted(check: Callable[..., object], *args: object) -> bool:
    """Whether a check lets its arguments pass; the only refusal is LLM_PARAM_INVALID."""
    try:
        check(*args)
    except LLMException as error:
        if error.status_code is not LLMStatusCode.LLM_PARAM_INVALID:
            raise
        return False
    return True


@pytest.mark.shows("pull.block_lists")
@examples
@given(geometry=any_geometry, blocks=st.lists(st.integers(-2, 9), min_size=1, max_size=6))
def test_block_indices_pass_when_the_cache_has_such_blocks_and_only_then(
    geometry: Geometry, blocks: list[int]
) -> None:
    has_them = geometry.kind is not CacheKind.CONTINUOUS and all(
        block in range(geometry.num_rows) for block in blocks
    )
    assert is_accepted(plan.check_blocks, geometry, blocks, "source") == has_them


# -- a batch row to blocks --


@st.composite
def row_spreads(draw: st.DrawFn) -> tuple[Memory, int, Memory, list[int]]:
    """A continuous cache, one of its rows, and the blocks of another that the row's bytes fill."""
    block, tensors = draw(sizes), draw(tensor_counts)
    rows, row = draw(st.integers(1, 4)), draw(st.integers(block, 40))
    dst_rows = draw(st.integers(1, 12))
    geometry = Geometry(draw(st.sampled_from(ROW_KINDS)), tensors, rows, row)
    source = draw(memories(geometry))
    geometry = Geometry(draw(st.sampled_from(BLOCK_KINDS)), tensors, dst_rows, block)
    destination = draw(memories(geometry, is_destination=True))
    dst_blocks = draw(distinct_blocks(dst_rows, -(-row // block)))
    return source, draw(st.integers(0, rows - 1)), destination, dst_blocks


@pytest.mark.shows("cm.pull_blocks.continuous", "O11")
@examples
@given(row_spreads())
def test_chunks_of_a_row_fill_the_blocks_in_order_and_a_tail_leaves_the_rest_of_its_block(
    copy: tuple[Memory, int, Memory, list[int]],
) -> None:
    source, src_row, destination, dst_blocks = copy
    block = destination.geometry.row_nbytes
    expected = destination.copy()
    for tensor in range(source.geometry.num_tensors):
        for index, dst in enumerate(dst_blocks):
            chunk = source.row(tensor, src_row)[index * block :][:block]
            expected.row(tensor, dst)[: len(chunk)] = chunk
    segments = plan.row_to_blocks(source.layout, src_row, destination.layout, dst_blocks)
    assert_moves(segments.flat(), source, destination, expected)


@pytest.mark.shows("cm.pull_blocks.continuous", "O11")
@examples
@given(data=st.data(), block=sizes, row=st.integers(1, 40), count=st.integers(1, 45))
def test_a_row_is_spread_over_no_larger_blocks_and_no_more_of_them_than_it_fills(
    data: st.DataObject, block: int, row: int, count: int
) -> None:
    source = data.draw(memories(Geometry(CacheKind.CONTINUOUS, 1, 2, row)))
    destination = data.draw(memories(Geometry(CacheKind.BLOCKS, 1, 45, block)))
    fits = block <= row and (count - 1) * block < row
    asked = (source.layout, 1, destination.layout, list(range(count)))
    assert is_accepted(plan.row_to_blocks, *asked) == fits


@examples
@given(dst_blocks=distinct_blocks(12, 12), data=st.data())
def test_neighbouring_blocks_of_a_spread_row_become_one_segment_per_tensor(
    dst_blocks: list[int], data: st.DataObject
) -> None:
    source = data.draw(memories(Geometry(CacheKind.CONTINUOUS, 3, 2, 34), min_gap=1))
    destination = data.draw(memories(Geometry(CacheKind.BLOCKS, 3, 12, 3), min_gap=1))
    runs = 1 + sum(second != first + 1 for first, second in pairwise(dst_blocks))
    segments = plan.row_to_blocks(source.layout, 1, destination.layout, dst_blocks)
    assert len(segments) == 3 * runs


# -- a batch row to a batch row --


@st.composite
def row_ends(draw: st.DrawFn, tensors: int, *, is_destination: bool) -> tuple[Memory, int, int]:
    """One end of a copy by rows: a cache with rows of any size, a row, and an offset into it."""
    geometry = Geometry(
        draw(st.sampled_from(ROW_KINDS)), tensors, draw(st.integers(1, 4)), draw(sizes)
    )
    memory = draw(memories(geometry, is_destination=is_destination))
    row = draw(st.integers(0, geometry.num_rows - 1))
    return memory, row, draw(st.integers(0, geometry.row_nbytes - 1))


@pytest.mark.shows("cm.pull_cache")
@examples
@given(data=st.data(), tensors=tensor_counts)
def test_bytes_of_a_row_arrive_behind_the_offset_in_the_other_row_of_every_tensor(
    data: st.DataObject, tensors: int
) -> None:
    source, src_row, src_offset = data.draw(row_ends(tensors, is_destination=False))
    destination, dst_row, dst_offset = data.draw(row_ends(tensors, is_destination=True))
    src_room = source.geometry.row_nbytes - src_offset
    dst_room = destination.geometry.row_nbytes - dst_offset
    nbytes = data.draw(st.integers(1, min(src_room, dst_room)))
    expected = destination.copy()
    for tensor in range(tensors):
        moved = source.row(tensor, src_row)[src_offset:][:nbytes]
        expected.row(tensor, dst_row)[dst_offset:][:nbytes] = moved
    segments = plan.row_to_row(
        source.layout,
        src_row,
        destination.layout,
        dst_row,
        nbytes,
        src_offset=src_offset,
        dst_offset=dst_offset,
    )
    assert_moves(segments, source, destination, expected)


@pytest.mark.shows("pull.size")
@examples
@given(geometry=any_geometry, nbytes=st.integers(0, 12), offset=st.integers(0, 10))
def test_a_copy_by_rows_passes_for_rows_that_hold_the_bytes_and_only_then(
    geometry: Geometry, nbytes: int, offset: int
) -> None:
    row = geometry.row_nbytes
    holds = geometry.kind is not CacheKind.BLOCKS and offset < row and offset + nbytes <= row
    assert is_accepted(plan.check_batch_rows, geometry, nbytes, "source", offset) == holds


@st.composite
def row_parts(draw: st.DrawFn) -> tuple[Memory, int, Memory, int, int, int]:
    """Two continuous caches, a row of each, an offset and a length; most fit, many just so."""
    tensors = draw(tensor_counts)
    row_sizes = draw(st.tuples(sizes, sizes))
    source = draw(memories(Geometry(CacheKind.CONTINUOUS, tensors, 2, row_sizes[0])))
    tensors += draw(st.sampled_from([0] * 9 + [1]))
    geometry = Geometry(CacheKind.MIX, tensors, 2, row_sizes[1])
    destination = draw(memories(geometry, is_destination=True))
    offset = draw(st.integers(0, min(row_sizes)) | st.integers(0, 2**64 - 1))
    room = max(1, min(row_sizes) - offset)
    nbytes = draw(st.just(-1) | st.integers(1, room + 1) | st.integers(1, 2**63 - 1))
    rows = st.sampled_from([0, 1, 0, 1, 0, 1, 0, 1, 2])
    return source, draw(rows), destination, draw(rows), offset, nbytes


@settings(examples, max_examples=150)
@given(row_parts())
def test_a_part_of_a_row_goes_to_the_same_place_of_another_or_is_refused(
    copy: tuple[Memory, int, Memory, int, int, int],
) -> None:
    source, src_row, destination, dst_row, offset, nbytes = copy
    src, dst = source.geometry, destination.geometry
    end = src.row_nbytes if nbytes == -1 else offset + nbytes
    fits = (
        src.num_tensors == dst.num_tensors
        and max(src_row, dst_row) < 2
        and offset < end <= min(src.row_nbytes, dst.row_nbytes)
    )
    expected = destination.copy()
    for tensor in range(src.num_tensors if fits else 0):
        moved = source.row(tensor, src_row)[offset:end]
        expected.row(tensor, dst_row)[offset:end] = moved

    def move() -> None:
        asked = CopyRow(1, 2, src_row, dst_row, offset, nbytes)
        execute(asked.segments(source.layout, destination.layout), source, destination)

    assert is_accepted(move) == fits
    np.testing.assert_array_equal(destination.cells, expected.cells)


# -- layers --

layer_ranges = st.none() | st.tuples(st.integers(0, 3), st.integers(0, 4)).map(
    lambda ends: range(*ends)
)


def tensors_named(layers: range | None, per_layer: int, num_tensors: int) -> list[int]:
    """Layer i is the tensors [i * n, (i + 1) * n); no layers, or none given, are all tensors."""
    if not layers:
        return list(range(num_tensors))
    return [layer * per_layer + part for layer in layers for part in range(per_layer)]


def are_layers_valid(
    remote: Sequence[int], local: Sequence[int], src: range | None, dst: range | None, n: int
) -> bool:
    """The tables of spec 6.9, on the tensors of both caches."""
    named = [tensors_named(src, n, len(remote)), tensors_named(dst, n, len(local))]
    is_whole = not (src or dst) or len(local) % n == 0
    is_there = set(named[0]) <= set(remote) and set(named[1]) <= set(local)
    return is_whole and is_there and len(named[0]) == len(named[1])


@pytest.mark.shows("cm.pull_cache.layers", "pull.ranges", "relies.9")
@settings(examples, max_examples=150)
@given(
    num_remote=st.integers(1, 8),
    num_local=st.integers(1, 8),
    src=layer_ranges,
    dst=layer_ranges,
    per_layer=st.integers(1, 3),
    data=st.data(),
)
def test_layer_ranges_move_the_tensors_they_name_or_are_refused(
    num_remote: int,
    num_local: int,
    src: range | None,
    dst: range | None,
    per_layer: int,
    data: st.DataObject,
) -> None:
    source = data.draw(memories(Geometry(CacheKind.CONTINUOUS, num_remote, 2, 3)))
    geometry = Geometry(CacheKind.CONTINUOUS, num_local, 2, 3)
    destination = data.draw(memories(geometry, is_destination=True))

    def move() -> None:
        layers = PulledLayers.of(src, dst, per_layer)
        layers.check(geometry)
        layouts = layers.select(source.layout, destination.layout)
        execute(plan.row_to_row(layouts[0], 1, layouts[1], 0, 3), source, destination)

    is_valid = are_layers_valid(range(num_remote), range(num_local), src, dst, per_layer)
    expected = destination.copy()
    if is_valid:
        from_tensors = tensors_named(src, per_layer, num_remote)
        to_tensors = tensors_named(dst, per_layer, num_local)
        for tensor_from, tensor_to in zip(from_tensors, to_tensors, strict=True):
            expected.row(tensor_to, 0)[:] = source.row(tensor_from, 1)
    assert is_accepted(move) == is_valid
    np.testing.assert_array_equal(destination.cells, expected.cells)
