"""Tensor and TensorDesc. Spec Appendix C."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llm_datadist.data_type import dtype_to_np_dtype
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.tensor import Tensor, TensorDesc
from llm_datadist.types import DataType

BF16 = DataType.DT_BF16


def bf16_bits(values: list[float]) -> list[int]:
    """What a Tensor of BF16 makes of float32 values."""
    tensor = Tensor(np.array(values, np.float32), TensorDesc(BF16, [len(values)]))
    return list((tensor.numpy().view(np.uint32) >> 16).tolist())


@pytest.mark.shows("v1.tensor")
@pytest.mark.parametrize("shape", [[2, 3], (2, 3), []])
def test_a_description_reads_back_as_it_was_given(shape: Any) -> None:
    desc = TensorDesc(DataType.DT_FLOAT, shape)
    assert (desc.dtype, desc.shape) == (DataType.DT_FLOAT, shape)
    assert repr(desc) == f"TensorDesc(dtype=DataType.DT_FLOAT, shape={shape})"


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(np.float32, [1]), (0, [1]), (None, [1]), (DataType.DT_INT8, None), (DataType.DT_INT8, [1.0])],
)
def test_a_description_of_wrong_types_is_refused(dtype: Any, shape: Any) -> None:
    with pytest.raises(TypeError, match="only support"):
        TensorDesc(dtype, shape)


@pytest.mark.parametrize("shape", [[0], [2, -1], [2**62, 4]])
def test_a_description_that_no_tensor_can_have_is_refused(shape: list[int]) -> None:
    with pytest.raises(LLMException) as error:
        TensorDesc(DataType.DT_FLOAT, shape)
    assert error.value.status_code == LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("v1.tensor")
@pytest.mark.parametrize("data_type", dtype_to_np_dtype)
def test_a_tensor_shares_the_memory_of_its_array(data_type: DataType) -> None:
    array = np.arange(6).astype(dtype_to_np_dtype[data_type])
    got = Tensor(array, TensorDesc(data_type, [2, 3])).numpy()
    assert got.dtype == array.dtype
    assert got.tolist() == array.reshape(2, 3).tolist()
    array[:] = array[::-1].copy()
    assert got.tolist() == array.reshape(2, 3).tolist()


def test_without_a_description_it_is_that_of_the_array() -> None:
    tensor = Tensor(np.zeros((2, 3), np.float16))
    assert tensor.tensor_desc == TensorDesc(DataType.DT_FLOAT16, (2, 3))
    assert repr(tensor) == "Tensor(TensorDesc(dtype=DataType.DT_FLOAT16, shape=(2, 3)))"


@pytest.mark.shows("v1.tensor")
def test_a_tensor_of_a_tensor_shares_its_memory_in_another_shape() -> None:
    first = Tensor(np.zeros(6, np.int32))
    second = Tensor(first, TensorDesc(DataType.DT_INT32, [3, 2]))
    second.numpy()[2, 1] = 7
    assert first.numpy().tolist() == [0, 0, 0, 0, 0, 7]
    assert Tensor(second).tensor_desc == second.tensor_desc


def test_no_dimensions_make_one_element() -> None:
    assert Tensor(np.array([7.5], np.float32), TensorDesc(DataType.DT_FLOAT, [])).numpy() == 7.5
    assert Tensor(np.array([0x40F0], np.uint16), TensorDesc(BF16, [])).numpy() == 7.5


@pytest.mark.parametrize(
    ("array", "data_type"),
    [
        (np.zeros(4, np.float64), DataType.DT_FLOAT),
        (np.zeros(4, ">f4"), DataType.DT_FLOAT),
        (np.zeros(4, np.int16), DataType.DT_FLOAT16),
        (np.zeros(4, np.float64), BF16),
        ([0.0] * 4, DataType.DT_FLOAT),
        (None, DataType.DT_FLOAT),
    ],
)
def test_elements_of_another_type_are_refused(array: Any, data_type: DataType) -> None:
    with pytest.raises(TypeError, match=r"needs an array of|only support"):
        Tensor(array, TensorDesc(data_type, [4]))


@pytest.mark.shows("v1.tensor")
def test_float16_described_as_bf16_is_rounded_and_copied() -> None:
    values = [1.0, -2.5, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 65504.0, 6e-8, float("inf"), float("nan")]
    array = np.array(values, np.float16)
    got = Tensor(array, TensorDesc(BF16, [2, 4])).numpy()
    wide = Tensor(array.astype(np.float32), TensorDesc(BF16, [2, 4])).numpy()
    assert got.dtype == np.float32
    assert got[0].tolist() == [1.0, -2.5, 1.0, 1.0 + 2**-6]
    assert np.array_equal(got, wide, equal_nan=True)
    array[:] = 0
    assert got[0, 0] == 1.0
    assert Tensor(Tensor(np.ones(2, np.float16)), TensorDesc(BF16, [2])).numpy().tolist() == [1, 1]


def test_a_description_must_be_one() -> None:
    with pytest.raises(TypeError, match="tensor_desc"):
        Tensor(np.zeros(4), DataType.DT_DOUBLE)  # type: ignore[arg-type]


def test_an_array_without_data_type_needs_a_description() -> None:
    with pytest.raises(TypeError, match="complex64: give a tensor_desc"):
        Tensor(np.zeros(4, np.complex64))


@pytest.mark.parametrize("shape", [[3], [5], [2, 2, 2], []])
def test_an_array_that_does_not_fill_the_shape_is_refused(shape: list[int]) -> None:
    with pytest.raises(LLMException, match="does not fill") as error:
        Tensor(np.zeros(4, np.float32), TensorDesc(DataType.DT_FLOAT, shape))
    assert error.value.status_code == LLMStatusCode.LLM_PARAM_INVALID


def test_strings_have_no_array() -> None:
    with pytest.raises(LLMException, match="DT_STRING") as error:
        Tensor(np.zeros(16, np.uint8), TensorDesc(DataType.DT_STRING, [1]))
    assert error.value.status_code == LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("v1.tensor")
def test_bits_of_bf16_are_shown_as_float32_and_copied() -> None:
    bits = np.array([0x3F80, 0xC020, 0x0000, 0x7F80], np.uint16)
    tensor = Tensor(bits, TensorDesc(BF16, [2, 2]))
    got = tensor.numpy()
    assert got.dtype == np.float32
    assert got.tolist() == [[1.0, -2.5], [0.0, float("inf")]]
    got[:] = 0
    bits[0] = 0x4000
    assert tensor.numpy()[0].tolist() == [2.0, -2.5]


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (-2.5, 0xC020),
        (1.0 + 2**-8, 0x3F80),  # halfway between two: the even one
        (1.0 + 3 * 2**-8, 0x3F82),
        (1.0 + 2**-8 + 2**-20, 0x3F81),
        (3.4e38, 0x7F80),  # nearest is infinity
        (float("-inf"), 0xFF80),
    ],
)
def test_float32_is_rounded_to_the_nearest_bf16(value: float, bits: int) -> None:
    assert bf16_bits([value]) == [bits]


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_nan_stays_one_in_bf16(bits: int) -> None:
    nan = np.array([bits], np.uint32).view(np.float32)
    assert np.isnan(Tensor(nan, TensorDesc(BF16, [1])).numpy()).all()


@pytest.mark.shows("v1.tensor")
def test_every_bf16_comes_back_from_float32() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    desc = TensorDesc(BF16, [2**16])
    shown = Tensor(bits, desc).numpy()
    again = Tensor(shown, desc).numpy()
    numbers = ~np.isnan(shown)
    assert np.array_equal(again.view(np.uint32)[numbers], shown.view(np.uint32)[numbers])
    assert np.isnan(again[~numbers]).all()
