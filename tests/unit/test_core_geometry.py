"""core.geometry by example. Spec 6.1."""

from __future__ import annotations

import numpy as np
import pytest

from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.errors import LLMException, LLMStatusCode


def covers(layout: Layout, addr: int, nbytes: int) -> bool:
    return layout.covers(np.array([addr], dtype=np.uint64), np.array([nbytes], dtype=np.uint64))


@pytest.mark.parametrize(
    ("shape", "nbytes", "rows", "row_nbytes"),
    [((7,), 28, 7, 4), ((3, 2, 4), 96, 3, 32), ((1, 9), 9, 1, 9), ((2,) * 31, 2**32, 2, 2**31)],
)
def test_dim_0_counts_the_rows(
    shape: tuple[int, ...], nbytes: int, rows: int, row_nbytes: int
) -> None:
    geometry = Geometry.of(CacheKind.BLOCKS, 5, shape, nbytes)
    assert geometry == Geometry(CacheKind.BLOCKS, 5, rows, row_nbytes)
    assert geometry.tensor_nbytes == nbytes


@pytest.mark.parametrize("rank", [0, 32])
def test_a_shape_of_a_rank_that_no_cache_has_is_param_invalid(rank: int) -> None:
    with pytest.raises(LLMException, match=f"this one {rank}") as caught:
        Geometry.of(CacheKind.CONTINUOUS, 1, (1,) * rank, 1)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize(
    ("kind", "has_batch_rows", "has_blocks"),
    [
        (CacheKind.CONTINUOUS, True, False),
        (CacheKind.BLOCKS, False, True),
        (CacheKind.MIX, True, True),
    ],
)
def test_the_kind_says_what_the_rows_are(
    kind: CacheKind, has_batch_rows: bool, has_blocks: bool
) -> None:
    geometry = Geometry(kind, 1, 1, 1)
    assert (geometry.has_batch_rows, geometry.has_blocks) == (has_batch_rows, has_blocks)


@pytest.mark.parametrize("addrs", [[], [4096], [4096] * 3])
def test_a_layout_needs_one_address_per_tensor(addrs: list[int]) -> None:
    with pytest.raises(LLMException, match="for 2 tensors") as caught:
        Layout.at(Geometry(CacheKind.BLOCKS, 2, 4, 8), addrs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize("addr", [-1, 2**64 - 31, 2**64, 2**70])
def test_an_address_where_no_such_tensor_can_lie_is_param_invalid(addr: int) -> None:
    with pytest.raises(LLMException, match="32 bytes") as caught:
        Layout.at(Geometry(CacheKind.BLOCKS, 1, 4, 8), [addr])
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_the_last_bytes_of_the_address_space_can_be_a_tensor() -> None:
    layout = Layout.at(Geometry(CacheKind.BLOCKS, 1, 4, 8), [2**64 - 32])
    assert covers(layout, 2**64 - 32, 32)


def test_selected_tensors_keep_their_addresses() -> None:
    layout = Layout.at(Geometry(CacheKind.BLOCKS, 4, 2, 8), [100, 300, 200, 400])
    part = layout.tensors(range(1, 3))
    assert part.geometry == Geometry(CacheKind.BLOCKS, 2, 2, 8)
    assert part.addrs.tolist() == [300, 200]


def test_without_a_selection_a_layout_keeps_all_tensors() -> None:
    layout = Layout.at(Geometry(CacheKind.BLOCKS, 2, 2, 8), [300, 100])
    assert layout.tensors(None).addrs.tolist() == [300, 100]


@pytest.mark.parametrize(
    ("addr", "nbytes"),
    [(16, 2**64 - 8), (31, 2**64 - 1), (15, 2), (0, 2**64 - 1), (2**64 - 1, 18)],
)
def test_a_range_that_wraps_around_is_not_covered(addr: int, nbytes: int) -> None:
    layout = Layout.at(Geometry(CacheKind.BLOCKS, 1, 2, 8), [16])
    assert not covers(layout, addr, nbytes)


def test_an_empty_range_is_covered_up_to_the_end_of_a_tensor_and_not_before_it() -> None:
    layout = Layout.at(Geometry(CacheKind.BLOCKS, 1, 2, 8), [2**64 - 32])
    ends = [2**64 - 33, 2**64 - 32, 2**64 - 16, 2**64 - 15]
    assert [covers(layout, addr, 0) for addr in ends] == [False, True, True, False]


def test_what_lies_before_the_first_tensor_is_not_covered_by_the_last_one() -> None:
    layout = Layout.at(Geometry(CacheKind.BLOCKS, 1, 2, 8), [2**64 - 16])
    assert not covers(layout, 0, 0)


def test_a_range_over_two_tensors_that_touch_is_not_covered() -> None:
    layout = Layout.at(Geometry(CacheKind.BLOCKS, 2, 2, 8), [16, 32])
    assert not covers(layout, 24, 16)


def test_one_range_outside_is_enough_for_all_not_to_be_covered() -> None:
    layout = Layout.at(Geometry(CacheKind.BLOCKS, 1, 2, 8), [16])
    addrs, nbytes = (np.array(column, dtype=np.uint64) for column in ([16, 24, 20], [8, 8, 13]))
    assert not layout.covers(addrs, nbytes)


def test_no_ranges_at_all_are_covered() -> None:
    layout = Layout.at(Geometry(CacheKind.BLOCKS, 1, 2, 8), [16])
    none = np.array([], dtype=np.uint64)
    assert layout.covers(none, none)
