"""The way between a paged cache and transformers' own."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llm_datadist.cli.demo.paged import PagedCache, PageShape  # noqa: E402  (imports torch)

SHAPE = PageShape(num_layers=3, block_tokens=4, num_kv_heads=2, head_dim=8)
NUM_BLOCKS = 7
LENGTHS = [1, 3, 4, 5, 8, 11]


def make_cache(num_tokens: int) -> Any:
    """What a model would have computed for `num_tokens` tokens, with other numbers."""
    generator = torch.Generator().manual_seed(num_tokens)
    cache = transformers.DynamicCache()
    for layer in range(SHAPE.num_layers):
        size = (1, SHAPE.num_kv_heads, num_tokens, SHAPE.head_dim)
        keys, values = (torch.randn(size, generator=generator) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def assert_equal(one: Any, other: Any) -> None:
    assert len(one.layers) == len(other.layers)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


def copy_block(source: PagedCache, number: int, target: PagedCache, other_number: int) -> None:
    """Copy one block of every tensor by address, as a pull does."""
    nbytes = SHAPE.block_nbytes // SHAPE.num_tensors
    for here, there in zip(source.addresses, target.addresses, strict=True):
        ctypes.memmove(there + other_number * nbytes, here + number * nbytes, nbytes)


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_what_was_scattered_is_gathered_bit_by_bit(num_tokens: int) -> None:
    cache = make_cache(num_tokens)
    pages = PagedCache(SHAPE, NUM_BLOCKS)
    blocks = [5, 0, 3][: SHAPE.num_blocks(num_tokens)]
    pages.scatter(cache, blocks)
    assert_equal(pages.gather(blocks, num_tokens), cache)


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_blocks_can_be_moved_by_address_to_other_numbers(num_tokens: int) -> None:
    cache = make_cache(num_tokens)
    prefill, decode = PagedCache(SHAPE, NUM_BLOCKS), PagedCache(SHAPE, NUM_BLOCKS + 2)
    blocks = [5, 0, 3][: SHAPE.num_blocks(num_tokens)]
    others = [2, 8, 1][: SHAPE.num_blocks(num_tokens)]
    prefill.scatter(cache, blocks)
    for block, other in zip(blocks, others, strict=True):
        copy_block(prefill, block, decode, other)
    assert_equal(decode.gather(others, num_tokens), cache)


def test_requests_in_one_cache_leave_each_other_alone() -> None:
    pages = PagedCache(SHAPE, NUM_BLOCKS)
    first, second = make_cache(6), make_cache(7)
    pages.scatter(first, [4, 1])
    pages.scatter(second, [0, 6])
    pages.erase([4])
    assert_equal(pages.gather([0, 6], 7), second)


def test_what_was_erased_or_never_written_cannot_be_read_unnoticed() -> None:
    pages = PagedCache(SHAPE, NUM_BLOCKS)
    pages.scatter(make_cache(4), [2])
    pages.erase([2])
    for block in (2, 3):
        for layer in pages.gather([block], 4).layers:
            assert torch.isnan(layer.keys).all()
            assert torch.isnan(layer.values).all()


@pytest.mark.parametrize("blocks", [[1], [1, 2, 3]])
def test_a_block_list_of_the_wrong_length_is_refused(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match="zip"):
        PagedCache(SHAPE, NUM_BLOCKS).scatter(make_cache(8), blocks)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_request_takes_as_few_blocks_as_possible(num_tokens: int, num_blocks: int) -> None:
    assert SHAPE.num_blocks(num_tokens) == num_blocks


def test_keys_and_values_take_turns_in_the_registered_tensors() -> None:
    pages = PagedCache(SHAPE, NUM_BLOCKS)
    cache = make_cache(4)
    pages.scatter(cache, [0])
    expected = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    for address, states in zip(pages.addresses, expected, strict=True):
        first_row = (ctypes.c_float * SHAPE.head_dim).from_address(address)
        assert list(first_row) == states[0, 0, 0].tolist()
