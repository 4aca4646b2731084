"""KVLayout: what a layout is made of, and what cannot be one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import CacheDesc, DataType, LLMException, LLMStatusCode
from llm_datadist.kv_layout import KVHeads, KVLayout

if TYPE_CHECKING:
    from collections.abc import Callable

BF16 = DataType.DT_BF16


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(LLMException) as caught:
        make()
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    return str(caught.value)


# -- heads --


@pytest.mark.parametrize(
    ("of", "ranks", "expected"),
    [
        (8, 2, [(0, 4), (4, 4)]),
        (3, 3, [(0, 1), (1, 1), (2, 1)]),
        (2, 4, [(0, 1), (0, 1), (1, 1), (1, 1)]),
        (1, 3, [(0, 1)] * 3),
    ],
)
def test_ranks_share_heads_equally_or_hold_the_same(
    of: int, ranks: int, expected: list[tuple[int, int]]
) -> None:
    shares = [KVHeads.share(of, rank, ranks) for rank in range(ranks)]
    assert [(share.first, share.count) for share in shares] == expected


@pytest.mark.parametrize(("of", "rank", "ranks"), [(8, 0, 3), (3, 0, 2), (8, 2, 2), (8, -1, 2)])
def test_heads_that_ranks_cannot_share_are_refused(of: int, rank: int, ranks: int) -> None:
    assert str(ranks) in refusal(lambda: KVHeads.share(of, rank, ranks))


@pytest.mark.parametrize("heads", [(-1, 1, 2), (0, 0, 2), (1, 2, 2), (0, 1, 0)])
def test_heads_that_a_model_does_not_have_are_refused(heads: tuple[int, int, int]) -> None:
    refusal(lambda: KVHeads(*heads))


# -- from a description --


@pytest.mark.parametrize(
    ("order", "num_tensors", "shape", "layers"),
    [
        ("HND", 6, [9, 2, 16, 8], 3),
        ("BNHD", 6, [9, 16, 2, 8], 3),
        ("KBHND", 3, [2, 9, 2, 16, 8], 3),
        ("BHNC", 3, [9, 2, 16, 16], 3),
        ("LBHNC", 1, [3, 9, 2, 16, 16], 3),
        ("LBNHC", 1, [3, 9, 16, 2, 16], 3),
        ("BLHNC", 1, [9, 3, 2, 16, 16], 3),
        ("LBHND", 2, [3, 9, 2, 16, 8], 3),
    ],
)
def test_one_rule_reads_every_order(
    order: str, num_tensors: int, shape: list[int], layers: int
) -> None:
    layout = KVLayout.of(CacheDesc(num_tensors, shape, BF16), order)
    assert layout.layers == tuple(range(layers))
    assert (layout.num_blocks, layout.block_tokens, layout.head_size) == (9, 16, 8)
    assert layout.heads == KVHeads.all(2)
    assert layout.num_tensors == num_tensors
    assert layout.nbytes == CacheDesc(num_tensors, shape, BF16).size


def test_an_order_without_heads_is_a_latent_cache() -> None:
    layout = KVLayout.of(CacheDesc(61, [9, 16, 576], BF16), "NC")
    assert layout.is_latent
    assert (layout.num_tensors, len(layout.layers), layout.head_size) == (61, 61, 576)


def test_the_words_of_a_layout_are_those_of_the_program() -> None:
    heads, names = KVHeads.share(8, 1, 4), ["model.0", "model.1"]
    desc = CacheDesc(4, [9, 2, 16, 8], BF16)
    layout = KVLayout.of(desc, "HND", heads=heads, layers=names)
    assert layout.heads == heads
    assert layout.layers == tuple(names)


# -- from a tensor --


def test_a_transposed_tensor_is_described_by_its_strides() -> None:
    """As engines have it: blocks of HND, seen as NHD."""
    array = np.zeros((9, 2, 16, 8), np.float32)
    seen = array.transpose(0, 2, 1, 3)
    strides = [stride // 4 for stride in seen.strides]
    as_seen = KVLayout.of_tensor(seen.shape, strides, DataType.DT_FLOAT, "NHD", num_tensors=2)
    as_lies = KVLayout.of(CacheDesc(2, array.shape, DataType.DT_FLOAT), "HND")
    axes = "BHND"
    assert [as_seen.stride(axis) for axis in axes] == [as_lies.stride(axis) for axis in axes]


def test_the_strides_of_what_is_there_once_do_not_matter() -> None:
    args: tuple[Any, ...] = ([4, 1, 2, 8], BF16, "HND")
    one, other = (
        KVLayout.of_tensor(args[0], strides, *args[1:], num_tensors=2)
        for strides in ([16, 16, 8, 1], [16, 3, 8, 1])
    )
    assert one == other
    assert hash(one) == hash(other)


def test_a_gap_between_blocks_is_part_of_a_layout() -> None:
    layout = KVLayout.of_tensor([3, 1, 2, 4], [100, 8, 4, 1], BF16, "HND", num_tensors=2)
    assert layout.stride("B") == 200
    assert layout.nbytes == 2 * (2 * 100 + 8)


# -- refusals --

DESC = CacheDesc(6, [9, 2, 16, 8], BF16)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KVLayout.of(DESC, "HNX"), "HNX is no order"),
        (lambda: KVLayout.of(DESC, "HNN"), "4 dims|no order"),
        (lambda: KVLayout.of(DESC, "ND"), "3 dims"),
        (lambda: KVLayout.of(DESC, "BHNDL"), "5 dims"),
        (lambda: KVLayout.of(DESC, "BHD"), "3 dims"),
        (lambda: KVLayout.of(DESC, "HND", heads=KVHeads(0, 1, 8)), "2 heads"),
        (lambda: KVLayout.of(DESC, "HND", layers=["a", "b"]), "3 layers"),
        (lambda: KVLayout.of(DESC, "HND", layers=["a", "b", "a"]), "twice"),
        (lambda: KVLayout.of(CacheDesc(5, [9, 2, 16, 8], BF16), "HND"), "5 tensors"),
        (lambda: KVLayout.of(CacheDesc(2, [9, 2, 16, 7], BF16), "HNC"), "7"),
        (lambda: KVLayout.of(CacheDesc(2, [3, 9, 2, 16, 8], BF16), "KBHND"), "axis K"),
        (lambda: KVLayout.of(CacheDesc(2, [3, 9, 2, 16, 8], BF16), "LKBHND"), "6 dims"),
        (lambda: KVLayout.of_tensor([4, 1, 2, 8], [8, 16, 8, 1], BF16, "HNC"), "axis B"),
    ],
)
def test_what_cannot_be_a_layout_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(LLMException, match=words):
        make()


def test_a_layout_that_reaches_beyond_its_tensors_is_refused() -> None:
    layout = KVLayout.of(DESC, "HND")
    layout.check_cache(6, DESC.size)
    assert "6 tensors" in refusal(lambda: layout.check_cache(5, DESC.size))
    assert str(DESC.size) in refusal(lambda: layout.check_cache(6, DESC.size - 1))
