"""Blocks swapped between host and device, and memory remapped. Spec 6.13, 6.14.

Every cache lies in an array that is larger than it, with bytes around it that must stay.
"""

from __future__ import annotations

from typing import Any

import framed_memory
import numpy as np
import pytest
from cache_owner import DEVICE, GONE, HOST, INVALID, PAGE, SUCCESS, status_of, view
from framed_memory import Framed, Shape, blocks, rows

from llm_datadist import (
    Cache,
    CacheDesc,
    DataType,
    LLMRole,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
)
from llm_datadist.testing.cluster import Node, NodeProcess, make_array

lone = framed_memory.lone


# -- swap_blocks -----------------------------------------------------------------------------------


@pytest.mark.shows("cm.swap_blocks")
@pytest.mark.parametrize("is_cpu_cache", [True, False], ids=["cpu-cache", "registered"])
@pytest.mark.parametrize("is_in", [True, False], ids=["in", "out"])
@pytest.mark.parametrize(
    "pairs",
    [
        {0: 0},
        {0: 5, 1: 6, 2: 7, 4: 0},
        {4: 3, 3: 2, 0: 7},
        {2: 1, 1: 1},
        {},
    ],
    ids=str,
)
def test_swap_blocks_copies_between_host_and_device(
    lone: Node, pairs: dict[int, int], is_in: bool, is_cpu_cache: bool
) -> None:
    src, dst = Framed((3, 5, 100), 1), Framed((3, 8, 100), 2)
    host, device = (src, dst) if is_in else (dst, src)
    host_cache = (
        Cache.create_cpu_cache(host.desc(HOST), host.addrs)
        if is_cpu_cache
        else blocks(lone, host, HOST)
    )
    device_cache = blocks(lone, device)
    if is_in:
        lone.manager.swap_blocks(host_cache, device_cache, pairs)
    else:
        lone.manager.swap_blocks(device_cache, host_cache, pairs)
    assert src.is_untouched()
    outcomes = []
    for winner in pairs if pairs == {2: 1, 1: 1} else [None]:  # of two, either may win
        expected = Framed((3, 8, 100), 2).inner.copy()
        for block, target in pairs.items():
            expected[:, target] = src.inner[:, winner if winner is not None else block]
        outcomes.append(expected)
    assert any(dst.became(expected) for expected in outcomes)


@pytest.mark.shows("cm.swap_blocks")
def test_swap_blocks_between_the_two_pools(lone: Node) -> None:
    shape = [4, PAGE // 4]
    manager = lone.manager
    host = manager.allocate_blocks_cache(CacheDesc(2, shape, DataType.DT_INT8, HOST))
    device = manager.allocate_blocks_cache(CacheDesc(2, shape, DataType.DT_INT8))
    for seed, each in enumerate((host, device)):
        for tensor, data in zip(view(each), make_array((2, PAGE), seed), strict=True):
            tensor[:] = data
    expected = make_array((2, PAGE), 1).reshape(2, 4, -1)
    expected[:, [1, 2]] = make_array((2, PAGE), 0).reshape(2, 4, -1)[:, [3, 0]]
    manager.swap_blocks(host, device, {3: 1, 0: 2})
    assert np.array_equal(view(device), expected.reshape(2, -1))
    manager.swap_blocks(device, host, {0: 0, 1: 1, 2: 2, 3: 3})
    assert np.array_equal(view(host), expected.reshape(2, -1))
    manager.deallocate_blocks_cache(device)
    assert status_of(manager.swap_blocks, host, device, {0: 0}) in (INVALID, GONE)
    assert np.array_equal(view(host), expected.reshape(2, -1))


@pytest.mark.shows("error.56")
@pytest.mark.parametrize(
    ("dst_shape", "pairs"),
    [
        ((3, 8, 100), {5: 0}),
        ((3, 8, 100), {0: 8}),
        ((3, 8, 100), {0: 1, -1: 2}),
        ((3, 8, 100), {0: -1}),
        ((3, 8, 100), {0: 2**64}),
        ((2, 8, 100), {0: 0}),
        ((3, 8, 99), {0: 0}),
        ((3, 8, 200), {0: 0}),
    ],
)
def test_blocks_that_do_not_fit_are_not_swapped(
    lone: Node, dst_shape: Shape, pairs: dict[int, int]
) -> None:
    src, dst = Framed((3, 5, 100), 1), Framed(dst_shape, 2)
    host, device = blocks(lone, src, HOST), blocks(lone, dst)
    assert status_of(lone.manager.swap_blocks, host, device, pairs) is INVALID
    assert dst.is_untouched()
    assert src.is_untouched()


@pytest.mark.shows("error.56")
@pytest.mark.parametrize("dst_shape", [(2, 5, 100), (3, 5, 99)], ids=str)
def test_caches_that_do_not_fit_are_refused_even_for_no_blocks(
    lone: Node, dst_shape: Shape
) -> None:
    host = blocks(lone, Framed((3, 5, 100), 1), HOST)
    device = blocks(lone, Framed(dst_shape, 2))
    assert status_of(lone.manager.swap_blocks, host, device, {}) is INVALID


@pytest.mark.shows("error.56")
@pytest.mark.parametrize(
    ("src_at", "dst_at"), [(HOST, HOST), (DEVICE, DEVICE)], ids=["hosts", "devices"]
)
def test_only_host_and_device_are_swapped(lone: Node, src_at: Placement, dst_at: Placement) -> None:
    src, dst = Framed((3, 5, 100), 1), Framed((3, 5, 100), 2)
    caches = blocks(lone, src, src_at), blocks(lone, dst, dst_at)
    assert status_of(lone.manager.swap_blocks, *caches, {0: 0}) is INVALID
    assert status_of(lone.manager.swap_blocks, caches[0], caches[0], {0: 1}) is INVALID
    assert dst.is_untouched()


@pytest.mark.shows("error.56")
def test_rows_are_not_swapped(lone: Node) -> None:
    src, dst = Framed((3, 5, 100), 1), Framed((3, 5, 100), 2)
    assert status_of(
        lone.manager.swap_blocks, rows(lone, src, HOST), blocks(lone, dst), {0: 0}
    ) is (INVALID)
    assert status_of(
        lone.manager.swap_blocks, blocks(lone, src, HOST), rows(lone, dst), {0: 0}
    ) is (INVALID)
    assert dst.is_untouched()


@pytest.mark.shows("error.56", "error.39")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"src_to_dst": None}, AttributeError),
        ({"src_to_dst": [(0, 0)]}, TypeError),
        ({"src_to_dst": {"0": 0}}, TypeError),
        ({"src_to_dst": {0: "0"}}, TypeError),
        ({"src_to_dst": {0: None}}, TypeError),
        ({"src_to_dst": {True: 0}}, TypeError),
        ({"src_to_dst": {0: [0]}}, TypeError),
        ({"src_cache": None}, AttributeError),
        ({"dst_cache": None}, AttributeError),
        ({"src_cache": 1}, TypeError),
        ({"dst_cache": [1]}, TypeError),
    ],
)
def test_swap_blocks_refuses_what_is_no_argument(
    lone: Node, arguments: dict[str, Any], expected: type[Exception]
) -> None:
    src, dst = Framed((3, 5, 100), 1), Framed((3, 5, 100), 2)
    given = {
        "src_cache": blocks(lone, src, HOST),
        "dst_cache": blocks(lone, dst),
        "src_to_dst": {0: 1},
        **arguments,
    }
    with pytest.raises(expected):
        lone.manager.swap_blocks(**given)
    assert dst.is_untouched()


def test_a_description_that_grew_does_not_let_a_swap_leave_the_cache(lone: Node) -> None:
    shape = [4, PAGE // 4]
    manager = lone.manager
    device = manager.allocate_blocks_cache(CacheDesc(1, shape, DataType.DT_INT8))
    neighbours = [manager.allocate_blocks_cache(CacheDesc(1, [4, PAGE // 4], DataType.DT_INT8))
                  for _ in range(15)]  # fmt: skip
    for cache in (device, *neighbours):
        view(cache)[0][:] = 0
    src = Framed((1, 8, PAGE // 4), 1)
    host = blocks(lone, src, HOST)
    device.cache_desc.update_dim(0, 8)
    assert status_of(manager.swap_blocks, host, device, {0: 5}) is INVALID
    assert not any(view(cache)[0].any() for cache in neighbours)


# -- remap_registered_memory -----------------------------------------------------------------------

MEMORY = MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 64)


@pytest.mark.shows("cm.remap_registered_memory", "error.59")
@pytest.mark.parametrize(
    "infos",
    [
        None,
        "memory",
        (MEMORY,),
        [MEMORY, None],
        [MEMORY, (1, 2, 3)],
        [],
        MemInfo(Memtype.MEM_TYPE_HOST, 4096, 64),
        MemInfo(Memtype.MEM_TYPE_DEVICE, 0, 64),
        MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 0),
        [MEMORY, MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, -1)],
    ],
)
def test_remap_refuses_what_is_no_device_memory(lone: Node, infos: Any) -> None:
    assert status_of(lone.manager.remap_registered_memory, infos) is INVALID


@pytest.mark.shows("cm.remap_registered_memory", "error.59")
def test_remap_needs_a_link_and_does_nothing(lone: Node, peer: NodeProcess) -> None:
    remap = lone.manager.remap_registered_memory
    assert status_of(remap, MEMORY) is LLMStatusCode.LLM_NOT_YET_LINK
    port = peer.call(Node.start, LLMRole.DECODER, 2, listen_ip_info="127.0.0.1:0")
    assert lone.link(port, 2) is SUCCESS
    assert status_of(remap, MEMORY) is SUCCESS
    assert status_of(remap, [MEMORY, MEMORY]) is SUCCESS
    assert status_of(remap, []) is INVALID
