"""What plans between layouts cost, and what they refuse. That they are right: tests/property."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest

from llm_datadist import CacheDesc, DataType, LLMException, LLMStatusCode
from llm_datadist.core.pattern import Windows, joined
from llm_datadist.core.reshard import planned, reshard
from llm_datadist.kv_layout import KVHeads, KVLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYERS, HEADS, HEAD_SIZE = 4, 8, 128


def make_layout(
    order: str = "BHND",
    heads: KVHeads | None = None,
    block_tokens: int = 16,
    layers: Sequence[int | str] = range(LAYERS),
    head_size: int = HEAD_SIZE,
    data_type: DataType = DataType.DT_BF16,
) -> KVLayout:
    held = heads or KVHeads.all(HEADS)
    sizes = {
        "L": len(layers), "K": 2, "B": 64, "H": held.count, "N": block_tokens, "D": head_size
    }  # fmt: skip
    num_tensors = (1 if "L" in order else len(layers)) * (
        1 if "K" in order or "H" not in order else 2
    )
    desc = CacheDesc(num_tensors, [sizes[axis] for axis in order], data_type)
    return KVLayout.of(desc, order, heads=heads, layers=list(layers))


SCATTERED = [5, 9, 2, 40, 17, 33]
TOKENS = 16 * len(SCATTERED)


# -- how many segments --


@pytest.mark.parametrize("order", ["BHND", "BNHD", "BHNKD"])
def test_equal_layouts_are_moved_by_whole_blocks(order: str) -> None:
    layout = make_layout(order)
    (pattern,) = reshard([layout], layout)
    assert pattern.num_segments(SCATTERED, SCATTERED[::-1]) == len(SCATTERED) * layout.num_tensors
    run = list(range(6))
    assert pattern.num_segments(run, run) == layout.num_tensors


def test_layers_inside_a_block_are_one_segment_with_it() -> None:
    layout = make_layout("BLHNKD")
    (pattern,) = reshard([layout], layout)
    assert pattern.num_segments(SCATTERED, SCATTERED[::-1]) == len(SCATTERED)


def test_hnd_cut_by_heads_is_one_segment_a_block() -> None:
    sources = [make_layout(heads=KVHeads.share(HEADS, rank, 8)) for rank in range(8)]
    patterns = reshard(sources, make_layout(heads=KVHeads.share(HEADS, 1, 4)))
    assert [pattern.source for pattern in patterns] == [2, 3]
    for pattern in patterns:
        assert pattern.num_segments(SCATTERED, SCATTERED) == len(SCATTERED) * 2 * LAYERS


def test_nhd_cut_by_heads_is_one_segment_a_token() -> None:
    source = make_layout("BNHD", heads=KVHeads.share(HEADS, 0, 2))
    (pattern,) = reshard([make_layout("BNHD")], source)
    assert pattern.num_segments(SCATTERED, SCATTERED) == TOKENS * 2 * LAYERS


def test_blocks_of_other_sizes_are_cut_once_for_each_smaller_block() -> None:
    small, large = make_layout(), make_layout(block_tokens=64)
    for ends in ((small, large), (large, small)):
        (pattern,) = reshard([ends[0]], ends[1])
        blocks = {small: [5, 9, 2, 40, 17, 33, 1, 8], large: [7, 3]}
        src, dst = (blocks[end] for end in ends)
        assert pattern.num_segments(src, dst) == 8 * HEADS * 2 * LAYERS


def test_nhd_of_other_block_sizes_merges_runs_of_blocks() -> None:
    (pattern,) = reshard([make_layout("BNHD")], make_layout("BNHD", block_tokens=64))
    assert pattern.num_segments(list(range(8)), [7, 3]) == 2 * 2 * LAYERS


# -- who is read --


def test_heads_that_several_ranks_hold_are_read_once() -> None:
    sources = [make_layout(heads=KVHeads.share(2, rank, 4)) for rank in range(4)]
    patterns = reshard(sources, make_layout(heads=KVHeads.all(2)))
    assert [pattern.source for pattern in patterns] == [0, 2]
    latent = make_layout("BND", head_size=576)
    assert [pattern.source for pattern in reshard([latent] * 4, latent)] == [0]


def test_layers_are_matched_by_name_whatever_their_order() -> None:
    sources = [make_layout(layers=["c", "a"]), make_layout(layers=["b"])]
    patterns = reshard(sources, make_layout(layers=["a", "b", "c"]))
    assert [(p.source, p.src_layers, p.dst_layers) for p in patterns] == [
        (0, (1, 0), (0, 2)),
        (1, (0,), (1,)),
    ]


def test_a_plan_is_made_once_for_layouts_that_are_equal() -> None:
    assert (
        reshard([make_layout()], make_layout("BNHD"))[0]
        is (reshard([make_layout()], make_layout("BNHD"))[0])
    )


def test_windows_keep_memory_bounded() -> None:
    (pattern,) = reshard([make_layout("BNHD")], make_layout())
    addrs = np.arange(2 * LAYERS, dtype=np.uint64) << np.uint64(32)
    windows = list(pattern.windows(SCATTERED, SCATTERED, None, addrs, addrs, count=100))
    assert max(map(len, windows)) <= 100
    assert sum(map(len, windows)) == pattern.num_segments(SCATTERED, SCATTERED)


def test_windows_are_what_is_planned_at_once() -> None:
    (pattern,) = reshard([make_layout("BNHD")], make_layout())
    addrs = np.arange(2 * LAYERS, dtype=np.uint64) << np.uint64(32)
    asked = SCATTERED, SCATTERED[::-1], None, addrs, addrs
    whole = pattern.segments(*asked)
    for count in (1, 7, 100):
        windows = joined([w.flat() for w in pattern.windows(*asked, count=count)])
        columns = [np.stack(each) for each in ((w.src, w.dst, w.nbytes) for w in (whole, windows))]
        ordered = [each[:, np.lexsort(each)] for each in columns]
        assert np.array_equal(ordered[0], ordered[1])


def test_a_layout_with_gaps_between_its_elements_takes_little_memory_to_plan() -> None:
    """A peer's may be any: here each element is a segment."""
    heads, tokens, size, layers = 8, 128, 128, 80
    shape = tuple(range(layers)), KVHeads.all(heads), 1, tokens, size, DataType.DT_FLOAT16, "BNHD"
    gapped = KVLayout(*shape, (0, 4 * heads * size, 4 * size, 4))
    addrs = np.arange(2 * layers, dtype=np.uint64) << np.uint64(32)
    (pattern,) = reshard([gapped], KVLayout(*shape))
    tracemalloc.start()
    try:
        plan = planned([pattern], addrs, [0], addrs, [0], None)
        assert isinstance(plan, Windows)
        assert len(plan) == 2 * layers * heads * tokens * size
        assert len(next(iter(plan))) > 0
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()


# -- refusals --


def test_the_names_that_a_peer_gives_its_layers_are_shortened_in_a_refusal() -> None:
    names = [f"{number}{'x' * 4000}" for number in range(LAYERS)]
    for theirs, ours in ((names, range(LAYERS)), (range(LAYERS), names)):
        with pytest.raises(LLMException) as caught:
            reshard([make_layout(layers=theirs)], make_layout(layers=ours))
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (make_layout(data_type=DataType.DT_FLOAT16), "DT_FLOAT16.*DT_BF16"),
        (make_layout(head_size=64), "axis D.*64.*128"),
        (make_layout(heads=KVHeads(0, 4, 4)), "axis H.*4.*8"),
        (make_layout(heads=KVHeads(0, 4, 8)), "axis H.*head 4 of 8.*0 to 3 of 8"),
        (make_layout(layers=range(LAYERS - 1)), "axis L.*layer 3.*0, 1, 2"),
        (make_layout(layers=["0", "1", "2", "3"]), "axis L.*layer 0.*'0'"),
        (make_layout("BND"), "axis H.*latent.*heads"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_with_the_axis_and_both_values(
    source: KVLayout, words: str
) -> None:
    with pytest.raises(LLMException, match=words) as caught:
        reshard([source], make_layout())
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_nobody_to_read_from_is_refused() -> None:
    with pytest.raises(LLMException, match="axis L"):
        reshard([], make_layout())


@pytest.mark.parametrize(
    ("src_blocks", "dst_blocks", "tokens", "words"),
    [
        ([1, 2, 3], [1], 64, "axis N.*4 blocks of the source.*16.*3"),
        ([1, 2, 3, 4], [1, 2], 64, "axis N.*1 blocks of the destination.*64.*2"),
        ([1, 2, 3, 4], [1, 2], None, "axis N.*destination"),
        ([1, 2], [1], range(60, 66), "axis N.*2 blocks of the destination"),
        ([1, 2], [1], 0, "tokens"),
        ([1, 2], [1], range(0, 4, 2), "tokens"),
        ([1, 2], [1], range(-4, 4), "tokens"),
        ([], [], None, "tokens"),
        ([1, 64], [1], 32, "axis B.*0 to 63.*1 to 64"),
        ([1, -1], [1], 32, "axis B"),
        ([1, 2], [64], 32, "axis B.*destination"),
    ],
)
def test_blocks_that_are_not_those_of_the_tokens_are_refused(
    src_blocks: list[int], dst_blocks: list[int], tokens: int | range | None, words: str
) -> None:
    (pattern,) = reshard([make_layout()], make_layout(block_tokens=64))
    with pytest.raises(LLMException, match=words) as caught:
        pattern.num_segments(src_blocks, dst_blocks, tokens)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
