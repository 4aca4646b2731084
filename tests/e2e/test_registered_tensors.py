"""Tensors and arrays where the interface takes addresses."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cache_owner
import numpy as np
import numpy.typing as npt
import pytest
from cache_owner import GONE, HOST, INVALID, SHAPE, Pair, desc_of, status_of
from element_names import NAMES, numpy_name
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMException,
    LLMRole,
)
from llm_datadist.testing.cluster import Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.cache_manager import CacheManager

pair = cache_owner.pair
lone = cache_owner.lone

Array = npt.NDArray[Any]
Register = Callable[..., Cache]

CPU, CUDA, CUDA_HOST, ROCM, CUDA_MANAGED, EXTERNAL = (
    (1, 0),
    (2, 3),
    (3, 0),
    (10, 0),
    (13, 0),
    (12, 0),
)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(params=["register_cache", "register_blocks_cache"])
def register(lone: Node, request: pytest.FixtureRequest) -> Register:
    """Either call."""
    call: Register = getattr(lone.manager, request.param)
    return call


@dataclass
class Foreign:
    """A tensor of another library: all it has is DLPack."""

    array: Array
    device: tuple[int, int] = CPU

    def __dlpack__(self, **request: object) -> object:
        array: Any = self.array
        return array.__dlpack__(**request)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


class ForeignOfOld(Foreign):
    """One from before DLPack had versions."""

    def __dlpack__(self, stream: None = None) -> object:  # type: ignore[override]
        return self.array.__dlpack__(stream=stream)


class OnlyCuda:
    """A tensor that says where it lies on a GPU, and nothing else."""

    __cuda_array_interface__ = {  # noqa: RUF012  (as the protocol has it)
        "shape": (4,), "typestr": "|i1", "data": (4096, False), "version": 3
    }  # fmt: skip


def addrs_in(array: Array) -> list[int]:
    """The address of each tensor of an array whose first dimension counts them."""
    return [int(tensor.ctypes.data) for tensor in array]


# -- what is taken ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data_type", NAMES)
def test_arrays_of_the_type_are_taken_where_they_lie(
    register: Register, data_type: DataType
) -> None:
    kv = np.zeros((2, 3, 4), numpy_name(data_type))
    desc = CacheDesc(2, [3, 4], data_type)
    for given_as in (kv, list(kv), [Foreign(each) for each in kv], Foreign(kv)):
        assert register(desc, given_as).tensor_addrs == addrs_in(kv)


@pytest.mark.parametrize("data_type", NAMES)
def test_tensors_of_torch_of_the_type_are_taken_where_they_lie(
    register: Register, torch: Any, data_type: DataType
) -> None:
    kv = torch.zeros((2, 3, 4), dtype=getattr(torch, NAMES[data_type]))
    desc = CacheDesc(2, [3, 4], data_type)
    for given_as in (kv, list(kv)):
        assert register(desc, given_as).tensor_addrs == [each.data_ptr() for each in kv]


def test_bfloat16_of_numpy_is_taken(register: Register) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    kv = np.zeros((2, 3, 4), bfloat16)
    cache = register(CacheDesc(2, [3, 4], DataType.DT_BF16), kv)
    assert cache.tensor_addrs == addrs_in(kv)
    kv[1, 2, 3] = 1.5
    assert cache.numpy()[1].view(bfloat16)[2, 3] == 1.5


def test_the_old_dlpack_and_pinned_memory_are_taken(register: Register) -> None:
    array = np.zeros((3, 4), np.int8)
    desc = desc_of((1, 3, 4))
    for tensor in (ForeignOfOld(array), Foreign(array, CUDA_HOST)):
        assert register(desc, [tensor]).tensor_addrs == addrs_in(array[None])


def test_addresses_and_tensors_may_be_mixed(register: Register) -> None:
    kv = np.zeros((3, 2, 4), np.int8)
    cache = register(desc_of((3, 2, 4)), [kv[0], int(kv[1].ctypes.data), Foreign(kv[2])])
    assert cache.tensor_addrs == addrs_in(kv)
    assert cache.tensors[2].numpy().ctypes.data == addrs_in(kv)[2]
    assert status_of(cache.tensors[1].numpy) is INVALID


def test_a_tensor_of_another_shape_is_taken_when_it_fills_that_of_the_cache(
    register: Register,
) -> None:
    paged = np.zeros((4, 2, 3, 5), np.float16)
    cache = register(CacheDesc(1, [4, 30], DataType.DT_FLOAT16), [paged])
    cache.numpy()[0][3, 29] = 7
    assert paged[3, 1, 2, 4] == 7


def test_a_cache_of_one_cluster_is_a_tensor_to_register(lone: Node) -> None:
    allocated = lone.manager.allocate_blocks_cache(desc_of(SHAPE))
    again = lone.manager.register_cache(desc_of(SHAPE), list(allocated.tensors))
    assert again.tensor_addrs == allocated.tensor_addrs


def test_views_of_registered_tensors_are_their_memory(register: Register) -> None:
    kv = make_array(SHAPE, 4).view(np.int8)
    cache = register(desc_of(SHAPE), [Foreign(each) for each in kv])
    assert np.array_equal(cache.numpy(), kv)
    cache.numpy()[2][1, 5] = 1
    kv[2, 1, 6] = 2
    assert kv[2, 1, 5] == 1
    assert cache.numpy()[2][1, 6] == 2


def test_registered_tensors_are_pulled_and_pulled_into(pair: Pair) -> None:
    pair.owner.call(register_and_forget, 5)
    kv = np.zeros(SHAPE, np.int8)
    cache = pair.node.manager.register_blocks_cache(desc_of(SHAPE), kv)
    pair.node.manager.pull_blocks(BlocksCacheKey(1), cache, [2, 0], [0, 1])
    assert np.array_equal(kv.view(np.uint8)[:, :2], make_array(SHAPE, 5)[:, [2, 0]])


def register_and_forget(node: Node, seed: int) -> int:
    """Nobody but the registration has the array afterwards."""
    kv = make_array(SHAPE, seed).view(np.int8)
    cache = node.manager.register_blocks_cache(desc_of(SHAPE), list(kv), BlocksCacheKey(1))
    return cache.cache_id


def test_blocks_are_swapped_with_the_tensors_of_a_cpu_cache(lone: Node) -> None:
    host = make_array((2, 4, 16), 1).view(np.int8)
    cpu = Cache.create_cpu_cache(desc_of(host.shape, HOST), [Foreign(each) for each in host])
    device = lone.manager.allocate_blocks_cache(desc_of(host.shape))
    lone.manager.swap_blocks(cpu, device, {3: 1})
    for array, data in zip(device.numpy(), host, strict=True):
        assert np.array_equal(array[1], data[3])
    with pytest.raises(LLMException, match=r"addrs\[1\] .*int16"):
        Cache.create_cpu_cache(desc_of(host.shape, HOST), [host[0], host[1].view(np.int16)])


def test_torch_is_not_imported_to_find_out_what_is_a_tensor() -> None:
    program = """
import sys
import numpy as np
from llm_datadist import Cache, CacheDesc, DataType, Placement
desc = CacheDesc(2, [1, 8], DataType.DT_INT8, Placement.HOST)
Cache.create_cpu_cache(desc, np.zeros((2, 1, 8), np.int8))
assert not {"torch", "jax", "cupy", "ml_dtypes"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


# -- how long they are kept ------------------------------------------------------------------------


class Marked(np.ndarray[Any, Any]):
    """An array that can be referred to weakly."""


def register_marked(node: Node) -> tuple[Cache, list[weakref.ref[Marked]]]:
    arrays = [make_array(SHAPE[1:], seed).view(np.int8).view(Marked) for seed in range(SHAPE[0])]
    tensors: list[Any] = [arrays[0], *map(Foreign, arrays[1:])]
    cache = node.manager.register_blocks_cache(desc_of(SHAPE), tensors, BlocksCacheKey(1))
    return cache, [weakref.ref(array) for array in arrays]


def are_gone(refs: list[weakref.ref[Marked]]) -> list[bool]:
    return [ref() is None for ref in refs]


def test_tensors_are_kept_until_they_are_unregistered(lone: Node) -> None:
    cache, refs = register_marked(lone)
    cache_id = cache.cache_id
    del cache
    assert not any(are_gone(refs))
    lone.manager.unregister_cache(cache_id)
    assert all(are_gone(refs))


def test_tensors_are_kept_until_the_cluster_is_finalized(lone: Node) -> None:
    cache, refs = register_marked(lone)
    assert not any(are_gone(refs))
    lone.stop()
    assert all(are_gone(refs))
    assert status_of(cache.numpy) is GONE


def test_a_view_keeps_a_registered_tensor_and_an_unregistered_cache_has_none(lone: Node) -> None:
    cache, refs = register_marked(lone)
    part = cache.numpy()[2][1:, 5]
    lone.manager.unregister_cache(cache.cache_id)
    assert are_gone(refs) == [True, True, False, True]
    assert status_of(cache.numpy) is GONE
    assert np.array_equal(part.view(np.uint8), make_array(SHAPE[1:], 2)[1:, 5])


@pytest.mark.parametrize("last", ["unregister", "finalize"])
def test_a_tensor_that_calls_the_manager_when_it_goes_does_not_lock_up(
    peer: NodeProcess, last: str
) -> None:
    assert peer.call(register_what_calls_back, last) == ["called"]


def register_what_calls_back(node: Node, last: str) -> list[str]:
    node.start(LLMRole.PROMPT, 1)
    calls: list[str] = []

    def call_back(manager: CacheManager) -> None:
        with suppress(LLMException):  # it may be finalized by now
            manager.unregister_cache(99)
        calls.append("called")

    array = np.zeros((1, 4), np.int8).view(Marked)
    weakref.finalize(array, call_back, node.manager)
    cache = node.manager.register_cache(desc_of((1, 1, 4)), [array])
    del array
    if last == "unregister":
        node.manager.unregister_cache(cache.cache_id)
    else:
        node.stop()
    return calls


def test_a_refused_registration_keeps_nothing(lone: Node) -> None:
    array = np.zeros(SHAPE[1:], np.int8).view(Marked)
    ref = weakref.ref(array)
    assert status_of(lone.manager.register_cache, desc_of(SHAPE), [array] * 3) is INVALID
    del array
    assert are_gone([ref]) == [True]


def test_tensors_of_a_cpu_cache_are_kept_as_long_as_it() -> None:
    array = make_array((2, 4), 1).view(np.int8).view(Marked)
    ref = weakref.ref(array)
    cache = Cache.create_cpu_cache(desc_of((1, 2, 4), HOST), [Foreign(array)])
    del array
    assert are_gone([ref]) == [False]
    del cache
    assert are_gone([ref]) == [True]


FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize("data_type", [DataType.DT_INT8, DataType.DT_UINT8])
def test_fp8_of_torch_moves_as_its_bits(
    lone: Node, register: Register, torch: Any, name: str, data_type: DataType
) -> None:
    bits = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    cache = register(CacheDesc(2, [3, 4], data_type), bits.view(getattr(torch, name)))
    if cache.is_blocks_cache:
        lone.manager.copy_blocks(cache, {0: [2]})
    else:
        lone.manager.copy_cache(cache, cache, 2, 0)
    assert (bits[:, 2] == bits[:, 0]).all()


@pytest.mark.parametrize("name", FLOAT8)
def test_fp8_of_numpy_moves_as_its_bits(register: Register, name: str) -> None:
    float8 = getattr(pytest.importorskip("ml_dtypes"), name)
    kv = np.zeros((2, 3, 4), float8)
    cache = register(CacheDesc(2, [3, 4], DataType.DT_UINT8), kv)
    kv[1, 2, 3] = 1.5
    assert cache.numpy()[1].view(float8)[2, 3] == 1.5


# -- what is refused -------------------------------------------------------------------------------


def read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


ZEROS = np.zeros((3, 4), np.float32)
REFUSED: dict[str, tuple[object, str]] = {
    "dtype": (ZEROS.astype(np.float64), "elements of float64, DataType.DT_FLOAT needs float32"),
    "foreign-dtype": (Foreign(ZEROS.view(np.int32)), "elements of int32, DataType.DT_FLOAT needs"),
    "complex": (Foreign(np.zeros((3, 4), np.complex64)), "elements of complex64"),
    "byte-order": (ZEROS.astype(">f4"), "elements of >f4"),
    "foreign-byte-order": (Foreign(ZEROS.astype(">f4")), "cannot be exported: .*byte order"),
    "small": (ZEROS[:2], r"shape \(2, 4\) does not fill the shape \(3, 4\)"),
    "large": (np.zeros((4, 4), np.float32), r"shape \(4, 4\) does not fill"),
    "empty": (Foreign(ZEROS[:0]), r"shape \(0, 4\) does not fill"),
    "transposed": (ZEROS.T, "not contiguous"),
    "strided": (Foreign(np.zeros((3, 8), np.float32)[:, ::2]), "not contiguous"),
    "read-only": (read_only(ZEROS.copy()), "read-only"),
    "foreign-read-only": (Foreign(read_only(ZEROS.copy())), "read-only"),
    "old-read-only": (ForeignOfOld(read_only(ZEROS.copy())), "cannot be exported: .*readonly"),
    "cuda": (Foreign(ZEROS, CUDA), "CUDA, device 3, and only process memory"),
    "cuda-managed": (Foreign(ZEROS, CUDA_MANAGED), "CUDA managed, device 0"),
    "rocm": (Foreign(ZEROS, ROCM), "ROCm, device 0"),
    "other-device": (Foreign(ZEROS, EXTERNAL), "DLPack's type 12, device 0"),
    "cuda-alone": (OnlyCuda(), "lies on CUDA, and only process memory"),
}  # fmt: skip


@pytest.mark.parametrize(("tensor", "text"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_its_place(
    register: Register, tensor: object, text: str
) -> None:
    desc = CacheDesc(3, [3, 4], DataType.DT_FLOAT)
    good = np.zeros((3, 4), np.float32)
    with pytest.raises(LLMException, match=rf"^addrs\[2\] .*{text}") as error:
        register(desc, [good, good, tensor])
    assert error.value.status_code is INVALID


@pytest.mark.parametrize(("tensor", "text"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_as_a_whole(
    register: Register, tensor: object, text: str
) -> None:
    with pytest.raises(LLMException, match=f"^addrs .*{text}") as error:
        register(CacheDesc(1, [3, 4], DataType.DT_FLOAT), tensor)
    assert error.value.status_code is INVALID


def test_what_torch_cannot_share_is_refused(register: Register, torch: Any) -> None:
    good = torch.zeros(3, 4)
    for bad, text in (
        (torch.zeros(3, 4, requires_grad=True), "cannot be exported: .*detach"),
        (torch.zeros(3, 4, device="meta"), "cannot be exported: .*meta"),
        (torch.zeros(4, 3).t(), "not contiguous"),
        (torch.zeros(3, 4, dtype=torch.float8_e4m3fn), "elements of float8_e4m3fn, "),
    ):
        with pytest.raises(LLMException, match=rf"addrs\[1\] .*{text}") as error:
            register(CacheDesc(2, [3, 4], DataType.DT_FLOAT), [good, bad])
        assert error.value.status_code is INVALID


def test_one_tensor_with_all_of_them_has_all_of_them(register: Register) -> None:
    with pytest.raises(LLMException, match=r"shape \(3, 4\) does not fill the shape \(2, 3, 4\)"):
        register(CacheDesc(2, [3, 4], DataType.DT_FLOAT), ZEROS)


def test_tensors_are_as_many_as_the_description_says(register: Register) -> None:
    assert status_of(register, CacheDesc(2, [3, 4], DataType.DT_FLOAT), [ZEROS] * 3) is INVALID


def test_strings_have_no_tensors(register: Register) -> None:
    with pytest.raises(LLMException, match="DT_STRING"):
        register(CacheDesc(1, [4], DataType.DT_STRING), [np.zeros((4, 16), np.uint8)])


@pytest.mark.parametrize("stray", [np.int64(4096), np.float32(1), b"bytes", bytearray(4), True])
def test_what_is_no_tensor_is_a_type_error_beside_tensors(
    register: Register, stray: object
) -> None:
    with pytest.raises(TypeError, match="addrs: inner type only supports int, got"):
        register(desc_of((2, 1, 4)), [np.zeros(4, np.int8), stray])


def test_a_tuple_of_tensors_is_a_type_error_as_one_of_addresses(register: Register) -> None:
    with pytest.raises(TypeError, match="addrs only supports list"):
        register(desc_of((1, 1, 4)), (np.zeros(4, np.int8),))


def test_a_tensor_of_a_freed_cache_is_refused(lone: Node) -> None:
    cache = lone.manager.allocate_cache(desc_of(SHAPE))
    tensors = list(cache.tensors)
    lone.manager.deallocate_cache(cache)
    assert status_of(lone.manager.register_cache, desc_of(SHAPE), tensors) is GONE


# -- any layout ------------------------------------------------------------------------------------


@st.composite
def views(draw: st.DrawFn) -> Array:
    """A part of an array, with its dimensions in any order."""
    dims = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    array = np.zeros(dims, draw(st.sampled_from([np.int8, np.float16, np.int32])))
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    for axis, dim in enumerate(array.shape):
        part = slice(draw(st.integers(0, dim - 1)), None, draw(st.sampled_from([1, 1, 2])))
        array = array[(slice(None),) * axis + (part,)]
    return array


@pytest.fixture(scope="module")
def node_for_all() -> Iterator[Node]:
    node = Node()
    node.start(LLMRole.PROMPT, 1)
    yield node
    node.stop()


TYPES = {"int8": DataType.DT_INT8, "float16": DataType.DT_FLOAT16, "int32": DataType.DT_INT32}


@settings(max_examples=50, deadline=None)
@given(array=views(), is_new=st.booleans())
def test_dlpack_is_read_as_numpy_sees_it(node_for_all: Node, array: Array, is_new: bool) -> None:
    desc = CacheDesc(1, array.shape, TYPES[array.dtype.name])
    tensor = Foreign(array) if is_new else ForeignOfOld(array)
    for given_as in (array, tensor):
        if array.flags.c_contiguous:
            cache = node_for_all.manager.register_blocks_cache(desc, [given_as])
            assert cache.tensor_addrs == [array.ctypes.data]
            node_for_all.manager.unregister_cache(cache.cache_id)
        else:
            with pytest.raises(LLMException, match="not contiguous"):
                node_for_all.manager.register_blocks_cache(desc, [given_as])
