"""The assertions of the testing kit: what they accept, and what they say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

from llm_datadist import Cache, CacheDesc, DataType, LLMRole, Placement
from llm_datadist.testing.assertions import assert_cache_equal, assert_untouched, bytes_of
from llm_datadist.testing.cluster import addrs_of, make_array

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Bytes, Node

SHAPE = (2, 8, 64)
POOL = '{"memory_size": 4194304}'


@pytest.fixture
def array() -> Bytes:
    return make_array(SHAPE, seed=1)


def cache_over(array: Bytes) -> Cache:
    desc = CacheDesc(SHAPE[0], SHAPE[1:], DataType.DT_INT8, Placement.HOST)
    return Cache.create_cpu_cache(desc, addrs_of(array))


def test_equal_bytes_pass_as_a_cache_an_array_or_one_array_each(array: Bytes) -> None:
    cache = cache_over(array)
    for expected in (array.copy(), list(array.copy()), array.copy().view(np.float16), cache):
        assert_cache_equal(cache, expected)
        assert_cache_equal(array, expected)
    assert np.array_equal(bytes_of(cache), array)


def test_the_message_names_the_tensor_the_block_and_the_byte(array: Bytes) -> None:
    expected = array.copy()
    array[1, 5, 17:20] ^= 0xFF
    array[1, 7, 0] ^= 1
    text = (
        f"cache -1 differs: tensor 1, block 5, byte 17 is {array[1, 5, 17]:#04x}, "
        f"expected {expected[1, 5, 17]:#04x}\n"
        "4 of 1024 bytes differ, in 2 of 16 blocks: tensor 1 block 5, tensor 1 block 7"
    )
    with pytest.raises(AssertionError, match=f"^{re.escape(text)}$"):
        assert_cache_equal(cache_over(array), expected)


def test_blocks_are_named_by_their_numbers_in_the_cache(array: Bytes) -> None:
    expected = array[:, [6, 2]].copy()
    assert_cache_equal(array, expected, blocks=[6, 2])
    array[0, 2, 3] ^= 1
    with pytest.raises(AssertionError, match="the array differs: tensor 0, block 2, byte 3 is "):
        assert_cache_equal(array, expected, blocks=[6, 2])


def test_what_was_not_to_change_is_named(array: Bytes) -> None:
    before = bytes_of(cache_over(array))
    array[:, [0, 5]] ^= 0xFF
    assert_untouched(array, before, except_blocks=[5, 0])
    with pytest.raises(AssertionError, match="in 2 of 14 blocks: tensor 0 block 5, tensor 1 block"):
        assert_untouched(array, before, except_blocks=[0])


def test_many_blocks_are_not_all_named(array: Bytes) -> None:
    with pytest.raises(AssertionError, match=r"in 16 of 16 blocks: .*tensor 0 block 7, \.\.\.$"):
        assert_cache_equal(array, ~array)


def test_a_continuous_cache_has_rows(node: Node) -> None:
    node.start(LLMRole.PROMPT, 1, mem_pool_cfg=POOL)
    cache = node.rows_cache(num_rows=4, row_nbytes=32, seed=1)
    expected = node.arrays[cache.cache_id].copy()
    expected[0, 3, 31] ^= 1
    with pytest.raises(AssertionError, match="cache 1 differs: tensor 0, row 3, byte 31 is"):
        assert_cache_equal(cache, expected)


def test_memory_that_is_gone_is_refused(node: Node, array: Bytes) -> None:
    node.start(LLMRole.PROMPT, 1, mem_pool_cfg=POOL)
    desc = CacheDesc(SHAPE[0], SHAPE[1:], DataType.DT_INT8)
    cache = node.manager.allocate_blocks_cache(desc)
    node.manager.deallocate_blocks_cache(cache)
    with pytest.raises(ValueError, match="cache 1 has no memory: it was deallocated"):
        assert_cache_equal(cache, array)
    cache = node.manager.register_blocks_cache(desc, [addrs_of(array)[0], 4096])
    with pytest.raises(ValueError, match="tensor 1 of cache 2 lies at 0x1000, which is not mapped"):
        assert_cache_equal(cache, array)


@pytest.mark.parametrize(
    ("expected", "blocks", "text"),
    [
        (np.zeros((2, 8, 32)), None, "cannot compare 2 tensors of 8 blocks of 64 bytes with"),
        (np.zeros((1, 8, 64), np.uint8), None, "expected 1 tensors of 8 blocks of 64 bytes"),
        (np.zeros((2, 1, 64), np.uint8), [8], r"no blocks \[8\]: the array has 2 tensors of 8"),
        ([np.zeros((8, 64)), np.zeros((8, 32))], None, r"sizes?: \[\(8, 64\), \(8, 32\)\]"),
        ([], None, "one array per tensor"),
        (np.zeros(8), None, "one array per tensor, whose dim 0 counts the blocks"),
    ],
)
def test_what_cannot_be_compared(
    array: Bytes, expected: Bytes, blocks: list[int] | None, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        assert_cache_equal(array, expected, blocks=blocks)
