"""Copies within a process: rows, blocks, and blocks between host and device. Spec 6.8, 6.13, 6.14.

Every cache lies in an array that is larger than it, with bytes around it that must stay.
"""

from __future__ import annotations

import ctypes
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import (
    Cache,
    CacheDesc,
    DataType,
    LLMException,
    LLMRole,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
)
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUCCESS = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
GONE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
HOST, DEVICE = Placement.HOST, Placement.DEVICE
MARGIN = 40
PAGE = 65536
Shape = tuple[int, int, int]


class Framed:
    """Memory for a cache [tensors, rows, bytes], with a margin around each tensor."""

    def __init__(self, shape: Shape, seed: int) -> None:
        tensors, rows, nbytes = shape
        self.shape = shape
        self.whole = make_array((tensors, MARGIN + rows * nbytes + MARGIN), seed)
        self._before = self.whole.copy()

    @property
    def addrs(self) -> list[int]:
        return [int(tensor.ctypes.data) + MARGIN for tensor in self.whole]

    @property
    def inner(self) -> Bytes:
        return self.whole[:, MARGIN:-MARGIN].reshape(self.shape)

    def desc(self, placement: Placement = DEVICE) -> CacheDesc:
        tensors, rows, nbytes = self.shape
        return CacheDesc(tensors, [rows, nbytes], DataType.DT_INT8, placement)

    def became(self, expected: Bytes) -> bool:
        """Whether the cache holds just that, and the margins what they held."""
        whole = self._before.copy()
        whole[:, MARGIN:-MARGIN] = expected.reshape(len(whole), -1)
        return bool(np.array_equal(self.whole, whole))

    def is_untouched(self) -> bool:
        return bool(np.array_equal(self.whole, self._before))


@pytest.fixture
def lone(node: Node) -> Iterator[Node]:
    """A node with pools for both placements."""
    pool = json.dumps({"memory_size": 16 * PAGE})
    node.start(LLMRole.PROMPT, 1, mem_pool_cfg=pool, host_mem_pool_cfg=pool)
    yield node
    node.stop()


def rows(node: Node, frame: Framed, placement: Placement = DEVICE) -> Cache:
    return node.manager.register_cache(frame.desc(placement), frame.addrs)


def blocks(node: Node, frame: Framed, placement: Placement = DEVICE) -> Cache:
    return node.manager.register_blocks_cache(frame.desc(placement), frame.addrs)


def status_of(call: Callable[..., object], *args: Any, **kwargs: Any) -> LLMStatusCode:
    try:
        call(*args, **kwargs)
    except LLMException as error:
        return error.status_code
    return SUCCESS


# -- copy_cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "size", "moved"),
    [
        (0, -1, slice(0, 100)),
        (0, 100, slice(0, 100)),
        (0, 1, slice(0, 1)),
        (37, -1, slice(37, 100)),
        (37, 63, slice(37, 100)),
        (37, 20, slice(37, 57)),
        (99, -1, slice(99, 100)),
    ],
)
def test_copy_cache_moves_the_part_of_a_row(
    lone: Node, offset: int, size: int, moved: slice
) -> None:
    src, dst = Framed((3, 4, 100), 1), Framed((3, 2, 120), 2)
    expected = dst.inner.copy()
    expected[:, 1, moved] = src.inner[:, 3, moved]
    lone.manager.copy_cache(rows(lone, dst), rows(lone, src), 1, 3, offset, size)
    assert dst.became(expected)
    assert src.is_untouched()


def test_a_row_is_copied_within_a_cache(lone: Node) -> None:
    frame = Framed((3, 4, 100), 1)
    expected = frame.inner.copy()
    expected[:, 2, 10:40] = expected[:, 0, 10:40]
    cache = rows(lone, frame)
    lone.manager.copy_cache(cache, cache, 2, 0, 10, 30, req_id=2**64 - 1)
    assert frame.became(expected)
    lone.manager.copy_cache(cache, cache, 1, 1)
    assert frame.became(expected)


@pytest.mark.parametrize(
    ("src_at", "dst_at"), [(HOST, DEVICE), (DEVICE, HOST), (HOST, HOST)], ids=str
)
def test_copy_cache_takes_any_placement(lone: Node, src_at: Placement, dst_at: Placement) -> None:
    src, dst = Framed((3, 4, 100), 1), Framed((3, 2, 100), 2)
    expected = dst.inner.copy()
    expected[:, 0] = src.inner[:, 2]
    lone.manager.copy_cache(rows(lone, dst, dst_at), rows(lone, src, src_at), 0, 2)
    assert dst.became(expected)


def test_shapes_and_types_may_differ(lone: Node) -> None:
    src, dst = Framed((2, 2, 96), 1), Framed((2, 4, 100), 2)
    words = CacheDesc(2, (2, 4, 3, 2), DataType.DT_FLOAT)
    cache = lone.manager.register_cache(words, src.addrs, remote_accessible=False)
    expected = dst.inner.copy()
    expected[:, 3, :96] = src.inner[:, 1]
    lone.manager.copy_cache(rows(lone, dst), cache, 3, 1)
    assert dst.became(expected)


def test_a_large_copy_moves_every_byte(lone: Node) -> None:
    src, dst = Framed((3, 2, 5_000_001), 1), Framed((3, 1, 5_000_001), 2)
    lone.manager.copy_cache(rows(lone, dst), rows(lone, src), 0, 1)
    assert dst.became(src.inner[:, 1:])


@pytest.mark.parametrize(
    ("src_shape", "dst_shape", "args"),
    [
        ((2, 2, 100), (3, 2, 100), (0, 0)),
        ((2, 2, 100), (2, 2, 100), (2, 0)),
        ((2, 2, 100), (2, 2, 100), (0, 2)),
        ((2, 2, 100), (2, 2, 100), (0, 2**32 - 1)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 100)),
        ((2, 2, 100), (2, 2, 200), (0, 0, 150, 1)),
        ((2, 2, 200), (2, 2, 100), (0, 0, 150, 1)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 2**64 - 1)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 2**64 - 1, 2)),
        ((2, 2, 100), (2, 2, 99), (0, 0)),
        ((2, 2, 100), (2, 2, 200), (0, 0, 0, 101)),
        ((2, 2, 200), (2, 2, 100), (0, 0, 0, 101)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 1, 100)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 0, 2**63 - 1)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 0, 0)),
        ((2, 2, 100), (2, 2, 100), (0, 0, 0, -2)),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    lone: Node, src_shape: Shape, dst_shape: Shape, args: tuple[int, ...]
) -> None:
    src, dst = Framed(src_shape, 1), Framed(dst_shape, 2)
    assert status_of(lone.manager.copy_cache, rows(lone, dst), rows(lone, src), *args) is INVALID
    assert dst.is_untouched()
    assert src.is_untouched()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"dst_batch_index": -1}, ValueError),
        ({"dst_batch_index": 2**32}, ValueError),
        ({"src_batch_index": "0"}, TypeError),
        ({"src_batch_index": True}, TypeError),
        ({"offset": -1}, ValueError),
        ({"offset": 1.0}, TypeError),
        ({"size": None}, TypeError),
        ({"size": 2**63}, ValueError),
        ({"req_id": -1}, ValueError),
        ({"req_id": "1"}, TypeError),
        ({"dst": None}, AttributeError),
        ({"src": None}, AttributeError),
        ({"dst": 1}, TypeError),
        ({"src": "cache"}, TypeError),
    ],
)
def test_copy_cache_refuses_what_is_no_argument(
    lone: Node, arguments: dict[str, Any], expected: type[Exception]
) -> None:
    src, dst = Framed((2, 2, 100), 1), Framed((2, 2, 100), 2)
    given = {"dst": rows(lone, dst), "src": rows(lone, src), **arguments}
    with pytest.raises(expected):
        lone.manager.copy_cache(**given)
    assert dst.is_untouched()


def test_blocks_are_not_copied_as_rows_nor_rows_as_blocks(lone: Node) -> None:
    frame = Framed((2, 2, 100), 1)
    cont, paged = rows(lone, frame), blocks(lone, frame)
    assert status_of(lone.manager.copy_cache, paged, cont, 1, 0) is INVALID
    assert status_of(lone.manager.copy_cache, cont, paged, 1, 0) is INVALID
    assert status_of(lone.manager.copy_blocks, cont, {0: [1]}) is INVALID
    assert frame.is_untouched()


def test_an_unregistered_cache_is_copied_no_more(lone: Node) -> None:
    src, dst = Framed((2, 2, 100), 1), Framed((2, 2, 100), 2)
    gone, kept, paged = rows(lone, src), rows(lone, dst), blocks(lone, dst)
    lone.manager.unregister_cache(gone.cache_id)
    lone.manager.unregister_cache(paged.cache_id)
    assert status_of(lone.manager.copy_cache, kept, gone) is GONE
    assert status_of(lone.manager.copy_cache, gone, kept) is GONE
    assert status_of(lone.manager.copy_blocks, paged, {0: [1]}) is GONE
    assert dst.is_untouched()
    assert src.is_untouched()


# -- copy_blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copies",
    [
        {0: [1]},
        {0: [9], 9: []},
        {2: [3, 4, 5], 0: [9, 1]},
        {0: [4], 1: [5], 2: [6], 3: [9]},  # a run
        {3: [4], 2: [5], 1: [6], 0: [7]},  # the same backwards
        {9: [0], 8: [1, 3]},
        {4: [4]},
    ],
    ids=str,
)
def test_copy_blocks_copies_each_block_to_its_list(
    lone: Node, copies: dict[int, list[int]]
) -> None:
    frame = Framed((3, 10, 100), 1)
    expected = frame.inner.copy()
    for block, targets in copies.items():
        expected[:, targets] = frame.inner[:, [block]]
    lone.manager.copy_blocks(blocks(lone, frame), copies)
    assert frame.became(expected)


@pytest.mark.parametrize("copies", [{}, {0: []}, {3: [], 99: []}], ids=str)
def test_no_copies_are_no_error(lone: Node, copies: dict[int, list[int]]) -> None:
    frame = Framed((3, 10, 100), 1)
    lone.manager.copy_blocks(blocks(lone, frame), copies)
    assert frame.is_untouched()


@pytest.mark.parametrize(
    "copies",
    [{10: [0]}, {0: [10]}, {0: [1, 10]}, {-1: [0]}, {0: [-1]}, {2**64: [0]}, {0: [2**70]}],
    ids=str,
)
def test_blocks_that_are_not_there_are_refused(lone: Node, copies: dict[int, list[int]]) -> None:
    frame = Framed((3, 10, 100), 1)
    assert status_of(lone.manager.copy_blocks, blocks(lone, frame), copies) is INVALID
    assert frame.is_untouched()


@pytest.mark.parametrize(
    "copies", [{0: 1}, {0: (1,)}, {"0": [1]}, {0: ["1"]}, {0: [None]}, {0: [True]}, [0, 1], None]
)
def test_copy_blocks_refuses_what_is_no_mapping(lone: Node, copies: Any) -> None:
    frame = Framed((3, 10, 100), 1)
    cache = blocks(lone, frame)
    with pytest.raises((TypeError, AttributeError)):
        lone.manager.copy_blocks(cache, copies)
    assert frame.is_untouched()


def test_the_inner_type_is_named(lone: Node) -> None:
    cache = blocks(lone, Framed((3, 10, 100), 1))
    wrong: Any = {0: ["1"]}
    with pytest.raises(TypeError, match="inner type only support"):
        lone.manager.copy_blocks(cache, wrong)
    with pytest.raises(AttributeError):
        lone.manager.copy_blocks(None, {0: [1]})  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        lone.manager.copy_blocks(3, {0: [1]})  # type: ignore[arg-type]


def test_allocated_blocks_are_copied_among_themselves_alone(lone: Node) -> None:
    desc = CacheDesc(2, [4, PAGE // 4], DataType.DT_INT8)
    before, cache, behind = (lone.manager.allocate_blocks_cache(desc) for _ in range(3))
    for seed, each in enumerate((before, cache, behind)):
        for tensor, data in zip(memory_of(each), make_array((2, PAGE), seed), strict=True):
            tensor[:] = data
    lone.manager.copy_blocks(cache, {0: [3], 1: [2]})
    expected = make_array((2, PAGE), 1).reshape(2, 4, -1)
    expected[:, [3, 2]] = expected[:, [0, 1]]
    assert np.array_equal(memory_of(cache), expected.reshape(2, -1))
    assert np.array_equal(memory_of(before), make_array((2, PAGE), 0))
    assert np.array_equal(memory_of(behind), make_array((2, PAGE), 2))


def memory_of(cache: Cache) -> list[Bytes]:
    """The tensors of an allocated cache: no copies."""
    nbytes = cache.cache_desc.size
    return [
        np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(addr))
        for addr in cache.tensor_addrs
    ]


# -- swap_blocks -----------------------------------------------------------------------------------


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


def test_swap_blocks_between_the_two_pools(lone: Node) -> None:
    shape = [4, PAGE // 4]
    manager = lone.manager
    host = manager.allocate_blocks_cache(CacheDesc(2, shape, DataType.DT_INT8, HOST))
    device = manager.allocate_blocks_cache(CacheDesc(2, shape, DataType.DT_INT8))
    for seed, each in enumerate((host, device)):
        for tensor, data in zip(memory_of(each), make_array((2, PAGE), seed), strict=True):
            tensor[:] = data
    expected = make_array((2, PAGE), 1).reshape(2, 4, -1)
    expected[:, [1, 2]] = make_array((2, PAGE), 0).reshape(2, 4, -1)[:, [3, 0]]
    manager.swap_blocks(host, device, {3: 1, 0: 2})
    assert np.array_equal(memory_of(device), expected.reshape(2, -1))
    manager.swap_blocks(device, host, {0: 0, 1: 1, 2: 2, 3: 3})
    assert np.array_equal(memory_of(host), expected.reshape(2, -1))
    manager.deallocate_blocks_cache(device)
    assert status_of(manager.swap_blocks, host, device, {0: 0}) in (INVALID, GONE)
    assert np.array_equal(memory_of(host), expected.reshape(2, -1))


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


@pytest.mark.parametrize("dst_shape", [(2, 5, 100), (3, 5, 99)], ids=str)
def test_caches_that_do_not_fit_are_refused_even_for_no_blocks(
    lone: Node, dst_shape: Shape
) -> None:
    host = blocks(lone, Framed((3, 5, 100), 1), HOST)
    device = blocks(lone, Framed(dst_shape, 2))
    assert status_of(lone.manager.swap_blocks, host, device, {}) is INVALID


@pytest.mark.parametrize(
    ("src_at", "dst_at"), [(HOST, HOST), (DEVICE, DEVICE)], ids=["hosts", "devices"]
)
def test_only_host_and_device_are_swapped(lone: Node, src_at: Placement, dst_at: Placement) -> None:
    src, dst = Framed((3, 5, 100), 1), Framed((3, 5, 100), 2)
    caches = blocks(lone, src, src_at), blocks(lone, dst, dst_at)
    assert status_of(lone.manager.swap_blocks, *caches, {0: 0}) is INVALID
    assert status_of(lone.manager.swap_blocks, caches[0], caches[0], {0: 1}) is INVALID
    assert dst.is_untouched()


def test_rows_are_not_swapped(lone: Node) -> None:
    src, dst = Framed((3, 5, 100), 1), Framed((3, 5, 100), 2)
    assert status_of(
        lone.manager.swap_blocks, rows(lone, src, HOST), blocks(lone, dst), {0: 0}
    ) is (INVALID)
    assert status_of(
        lone.manager.swap_blocks, blocks(lone, src, HOST), rows(lone, dst), {0: 0}
    ) is (INVALID)
    assert dst.is_untouched()


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
        memory_of(cache)[0][:] = 0
    src = Framed((1, 8, PAGE // 4), 1)
    host = blocks(lone, src, HOST)
    device.cache_desc.update_dim(0, 8)
    assert status_of(manager.swap_blocks, host, device, {0: 5}) is INVALID
    assert not any(memory_of(cache)[0].any() for cache in neighbours)


# -- memory that is not mapped ---------------------------------------------------------------------


def test_unmapped_memory_is_an_error_and_no_crash(lone: Node) -> None:
    mapped = Framed((1, 4, 64), 1)
    desc = CacheDesc(1, [4, 64], DataType.DT_INT8)
    host_desc = CacheDesc(1, [4, 64], DataType.DT_INT8, HOST)
    manager = lone.manager
    good_rows, good_blocks = rows(lone, mapped), blocks(lone, mapped)
    bad_rows = manager.register_cache(desc, [4096])
    bad_blocks = manager.register_blocks_cache(desc, [4096])
    bad_cpu = Cache.create_cpu_cache(host_desc, [4096])
    good_cpu = Cache.create_cpu_cache(host_desc, mapped.addrs)
    expected = mapped.inner.copy()
    calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = [
        (manager.copy_cache, (good_rows, bad_rows)),
        (manager.copy_cache, (bad_rows, good_rows)),
        (manager.copy_cache, (bad_rows, bad_rows, 0, 1)),
        (manager.copy_blocks, (bad_blocks, {0: [1]})),
        (manager.swap_blocks, (bad_cpu, good_blocks, {0: 1})),
        (manager.swap_blocks, (good_blocks, bad_cpu, {0: 1})),
        (manager.swap_blocks, (good_cpu, bad_blocks, {0: 1})),
    ]
    for call, args in calls:
        with pytest.raises(LLMException, match="not mapped") as error:
            call(*args)
        assert error.value.status_code in (INVALID, LLMStatusCode.LLM_FAILED)
    assert mapped.became(expected)
    manager.copy_cache(good_rows, good_rows, 1, 0)
    expected[:, 1] = expected[:, 0]
    assert mapped.became(expected)


# -- remap_registered_memory -----------------------------------------------------------------------

MEMORY = MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 64)


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


def test_remap_needs_a_link_and_does_nothing(lone: Node, peer: NodeProcess) -> None:
    remap = lone.manager.remap_registered_memory
    assert status_of(remap, MEMORY) is LLMStatusCode.LLM_NOT_YET_LINK
    port = peer.call(Node.start, LLMRole.DECODER, 2, listen_ip_info="127.0.0.1:0")
    assert lone.link(port, 2) is SUCCESS
    assert status_of(remap, MEMORY) is SUCCESS
    assert status_of(remap, [MEMORY, MEMORY]) is SUCCESS
    assert status_of(remap, []) is INVALID
