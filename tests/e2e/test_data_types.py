"""Caches of every data type and kind of shape. Spec 12, line 10."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import linked_pair
import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, CacheDesc, DataType
from llm_datadist.testing.cluster import addrs_of, make_array

if TYPE_CHECKING:
    from linked_pair import Pair

pair = linked_pair.pair

KEY = BlocksCacheKey(1, 0)
NUM_TENSORS, NUM_BLOCKS, NUM_ELEMENTS = 2, 6, 40


def shaped(kind: str) -> list[int] | tuple[int, ...]:
    dims = [NUM_BLOCKS, NUM_ELEMENTS]
    if kind == "torch.Size":
        torch: Any = pytest.importorskip("torch", reason="torch is not installed")
        size: tuple[int, ...] = torch.Size(dims)
        return size
    return dims if kind == "list" else tuple(dims)


@pytest.mark.shows("relies.10")
@pytest.mark.parametrize("kind", ["list", "tuple", "torch.Size"])
def test_a_shape_reads_back_as_it_came(pair: Pair, kind: str) -> None:
    shape = shaped(kind)
    array = make_array((NUM_TENSORS, NUM_BLOCKS, NUM_ELEMENTS), None)
    pair.peer.call(linked_pair.add_blocks, NUM_TENSORS, NUM_BLOCKS, NUM_ELEMENTS, seed=1, key=KEY)
    desc = CacheDesc(NUM_TENSORS, shape, DataType.DT_INT8)
    cache = pair.node.manager.register_blocks_cache(desc, addrs_of(array))
    assert cache.cache_desc.shape is shape
    assert list(cache.cache_desc.shape) == [NUM_BLOCKS, NUM_ELEMENTS]
    pair.node.manager.pull_blocks(KEY, cache, [1], [4])
    source = make_array(array.shape, 1)
    np.testing.assert_array_equal(array[:, 4], source[:, 1])


@pytest.mark.shows("relies.10")
@pytest.mark.parametrize(
    ("data_type", "nbytes"),
    [
        (DataType.DT_FLOAT16, 2),
        (DataType.DT_BF16, 2),
        (DataType.DT_FLOAT, 4),
        (DataType.DT_INT8, 1),
        (DataType.DT_INT32, 4),
        (DataType.DT_INT64, 8),
        (DataType.DT_UINT8, 1),
    ],
    ids=str,
)
def test_every_data_type_moves(pair: Pair, data_type: DataType, nbytes: int) -> None:
    block_nbytes = NUM_ELEMENTS * nbytes
    pair.peer.call(linked_pair.add_blocks, NUM_TENSORS, NUM_BLOCKS, block_nbytes, seed=1, key=KEY)
    array = make_array((NUM_TENSORS, NUM_BLOCKS, block_nbytes), None)
    desc = CacheDesc(NUM_TENSORS, [NUM_BLOCKS, NUM_ELEMENTS], data_type)
    cache = pair.node.manager.register_blocks_cache(desc, addrs_of(array))
    pair.node.manager.pull_blocks(KEY, cache, [5, 0], [0, 3])
    expected = np.zeros_like(array)
    expected[:, [0, 3]] = make_array(array.shape, 1)[:, [5, 0]]
    np.testing.assert_array_equal(array, expected)
