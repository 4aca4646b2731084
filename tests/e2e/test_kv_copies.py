"""The v1 mode: copies within a cluster, and tensors to look into."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import v1_cluster
from v1_cluster import (
    INVALID,
    NOT_EXIST,
    assert_refused,
    desc_of,
    make_blocks,
    make_rows,
    manager_of,
    read,
)

from llm_datadist import (
    CacheDesc,
    DataType,
    LLMException,
    Placement,
    Tensor,
)
from llm_datadist.kv_cache import KvCache
from llm_datadist.testing.cluster import Bytes, Node, addrs_of, make_array

alone = v1_cluster.alone


# -- within this process --


@pytest.mark.shows("v1.copy_cache")
def test_copy_cache_copies_a_part_of_a_row(alone: Node) -> None:
    src, dst = make_rows(alone, 2, 3, 64, seed=1), make_rows(alone, 2, 2, 80, seed=2)
    manager_of(alone).copy_cache(dst, src, 1, 2, 8, 40)
    expected = make_array((2, 2, 80), 2)
    expected[:, 1, 8:48] = make_array((2, 3, 64), 1)[:, 2, 8:48]
    assert np.array_equal(read(alone, dst), expected)


@pytest.mark.shows("v1.copy_blocks")
def test_copy_blocks_copies_a_block_to_several(alone: Node) -> None:
    cache = make_blocks(alone, 2, 8, 64, seed=1)
    manager_of(alone).copy_blocks(cache, {1: [2, 7], 3: [0]})
    expected = make_array((2, 8, 64), 1)
    expected[:, [2, 7]], expected[:, 0] = expected[:, [1, 1]], expected[:, 3]
    assert np.array_equal(read(alone, cache), expected)


@pytest.mark.shows("v1.copy_cache", "v1.copy_blocks")
def test_copies_that_cannot_be_are_refused_and_nothing_is_written(alone: Node) -> None:
    rows, blocks = make_rows(alone, 2, 3, 64, seed=1), make_blocks(alone, 2, 3, 64, seed=2)
    others = make_rows(alone, 1, 3, 64)
    copy, copy_blocks = manager_of(alone).copy_cache, manager_of(alone).copy_blocks
    assert_refused(INVALID, "use copy_blocks", copy, rows, blocks)
    assert_refused(INVALID, "use copy_blocks", copy, blocks, rows)
    assert_refused(INVALID, "use copy_cache", copy_blocks, rows, {0: [1]})
    assert_refused(INVALID, "tensors", copy, rows, others)
    assert_refused(INVALID, None, copy, rows, rows, 3, 0)
    assert_refused(INVALID, None, copy, rows, rows, 0, 3)
    assert_refused(INVALID, None, copy, rows, rows, 0, 1, 60, 5)
    assert_refused(INVALID, None, copy_blocks, blocks, {0: [1, 3]})
    assert_refused(INVALID, None, copy_blocks, blocks, {3: [1]})
    assert np.array_equal(read(alone, rows), make_array((2, 3, 64), 1))
    assert np.array_equal(read(alone, blocks), make_array((2, 3, 64), 2))


@pytest.mark.shows("v1.swap_blocks")
@pytest.mark.parametrize("is_nested", [False, True])
def test_blocks_are_swapped_out_to_a_cpu_cache_and_in_again(alone: Node, is_nested: bool) -> None:
    host = make_array((2, 6, 64), 2)
    desc = CacheDesc(2, [6, 64], DataType.DT_UINT8, Placement.HOST)
    addrs: Any = [addrs_of(host)] if is_nested else addrs_of(host)
    cpu, device = KvCache.create_cpu_cache(desc, addrs), make_blocks(alone, 2, 4, 64, seed=1)
    manager_of(alone).swap_blocks(device, cpu, {0: 5, 3: 1})
    expected = make_array((2, 6, 64), 2)
    expected[:, [5, 1]] = make_array((2, 4, 64), 1)[:, [0, 3]]
    assert np.array_equal(host, expected)
    manager_of(alone).swap_blocks(cpu, device, {5: 2})
    assert np.array_equal(read(alone, device)[:, 2], make_array((2, 4, 64), 1)[:, 0])


@pytest.mark.shows("v1.swap_blocks")
def test_swaps_that_cannot_be_are_refused_and_nothing_is_written(alone: Node) -> None:
    host = make_array((2, 6, 64), 2)
    desc = CacheDesc(2, [6, 64], DataType.DT_UINT8, Placement.HOST)
    cpu, device = KvCache.create_cpu_cache(desc, addrs_of(host)), make_blocks(alone, 2, 4, 64)
    swap = manager_of(alone).swap_blocks
    assert_refused(INVALID, "HOST and a DEVICE", swap, cpu, cpu, {0: 1})
    assert_refused(INVALID, "HOST and a DEVICE", swap, device, device, {0: 1})
    assert_refused(INVALID, "blocks caches", swap, cpu, make_rows(alone, 2, 4, 64), {0: 1})
    assert_refused(INVALID, "tensors", swap, cpu, make_blocks(alone, 1, 4, 64), {0: 1})
    assert_refused(INVALID, "bytes", swap, cpu, make_blocks(alone, 2, 4, 32), {0: 1})
    assert_refused(INVALID, None, swap, cpu, device, {0: 4})
    assert_refused(INVALID, None, swap, device, cpu, {4: 0})
    assert_refused(INVALID, None, swap, device, cpu, {-1: 0})
    assert np.array_equal(host, make_array((2, 6, 64), 2))
    assert not read(alone, device).any()


@pytest.mark.shows("v1.swap_blocks")
def test_a_cpu_cache_is_for_swapping_alone(alone: Node) -> None:
    host = make_array((2, 6, 64), 2)
    desc = CacheDesc(2, [6, 64], DataType.DT_UINT8, Placement.HOST)
    cpu = KvCache.create_cpu_cache(desc, addrs_of(host))
    manager = manager_of(alone)
    assert_refused(NOT_EXIST, None, manager.copy_blocks, cpu, {0: [1]})
    assert_refused(NOT_EXIST, "no memory of this library", manager.get_cache_tensors, cpu)
    manager.deallocate_cache(cpu)
    assert cpu.per_device_tensor_addrs == [addrs_of(host)]


# -- tensors --


@pytest.mark.shows("v1.get_cache_tensors")
def test_a_tensor_is_the_memory_of_the_cache(alone: Node) -> None:
    desc = CacheDesc(2, [3, 2, 4], DataType.DT_FLOAT16)
    cache = manager_of(alone).allocate_cache(desc)
    tensors = manager_of(alone).get_cache_tensors(cache, 1)
    assert [type(tensor) for tensor in tensors] == [Tensor]
    array = tensors[0].numpy()
    assert (array.dtype, array.shape) == (np.dtype(np.float16), (3, 2, 4))
    array[:] = np.arange(24).reshape(3, 2, 4)
    again = manager_of(alone).get_cache_tensors(cache, 1)[0].numpy()
    assert np.array_equal(again, np.arange(24).reshape(3, 2, 4))
    assert addrs_of(again[None]) == cache.per_device_tensor_addrs[0][1:]


def test_bf16_is_shown_as_a_copy_in_float32(alone: Node) -> None:
    cache = manager_of(alone).allocate_cache(CacheDesc(1, [1, 4], DataType.DT_BF16))
    byte_desc = CacheDesc(1, [4, 2], DataType.DT_UINT8, Placement.HOST)
    bits = np.array([[0x3F80, 0xC020, 0x0000, 0x4049]], np.uint16)
    cpu = KvCache.create_cpu_cache(byte_desc, [int(bits.ctypes.data)])
    blocks = manager_of(alone).allocate_blocks_cache(CacheDesc(1, [4, 1], DataType.DT_BF16))
    manager_of(alone).swap_blocks(cpu, blocks, {i: i for i in range(4)})
    shown = manager_of(alone).get_cache_tensors(blocks)[0].numpy()
    assert shown.dtype == np.float32
    assert shown[:, 0].tolist() == [1.0, -2.5, 0.0, 3.140625]
    shown[:] = 9
    assert manager_of(alone).get_cache_tensors(blocks)[0].numpy()[0, 0] == 1.0
    assert manager_of(alone).get_cache_tensors(cache)[0].numpy().shape == (1, 4)


@pytest.mark.shows("v1.get_cache_tensors")
def test_an_index_of_minus_one_is_all_tensors_in_order(alone: Node) -> None:
    cache = make_rows(alone, 3, 2, 8, seed=1)
    manager = manager_of(alone)
    every: list[Bytes] = [tensor.numpy() for tensor in manager.get_cache_tensors(cache, -1)]
    assert np.array_equal(every, make_array((3, 2, 8), 1))
    assert [addrs_of(array[None]) for array in every] == [
        [addr] for addr in cache.per_device_tensor_addrs[0]
    ]
    manager.deallocate_cache(cache)
    assert_refused(NOT_EXIST, "no memory", manager.get_cache_tensors, cache, -1)


@pytest.mark.shows("v1.get_cache_tensors")
def test_a_tensor_has_the_shape_that_was_allocated(alone: Node) -> None:
    desc = desc_of(1, 4, 16)
    cache = manager_of(alone).allocate_cache(desc)
    desc.update_dim(1, 2**40)
    assert manager_of(alone).get_cache_tensors(cache)[0].numpy().shape == (4, 16)


@pytest.mark.shows("v1.get_cache_tensors")
@pytest.mark.parametrize(
    ("index", "error"),
    [(2, LLMException), (-2, ValueError), (2**32, ValueError), (0.0, TypeError), (None, TypeError)],
)
def test_a_tensor_index_that_is_none_is_refused(
    alone: Node, index: Any, error: type[Exception]
) -> None:
    cache = make_rows(alone, 2, 1, 8)
    with pytest.raises(error, match="tensor_index"):
        manager_of(alone).get_cache_tensors(cache, index)


def test_strings_have_no_tensor(alone: Node) -> None:
    cache = manager_of(alone).allocate_cache(CacheDesc(1, [2], DataType.DT_STRING))
    assert_refused(INVALID, "DT_STRING", manager_of(alone).get_cache_tensors, cache)
