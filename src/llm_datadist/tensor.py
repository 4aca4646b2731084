"""Tensor and TensorDesc: numpy's view of a tensor of a cache. Spec Appendix C."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from llm_datadist.checks import check_optional, check_sequence, check_type
from llm_datadist.data_type import np_dtype_to_dtype
from llm_datadist.errors import invalid
from llm_datadist.memory.views import storage_type
from llm_datadist.types import DataType, tensor_nbytes

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


@final
@dataclass(frozen=True, slots=True, repr=False)
class TensorDesc:
    """The type of a tensor's elements and its shape. Spec Appendix C.

    No dimensions at all make one element. Raises TypeError for a wrong type, LLMException when a
    dimension is not positive or the size exceeds an int64.
    """

    dtype: DataType
    shape: list[int] | tuple[int, ...]  #: the object that was passed in

    def __post_init__(self) -> None:
        check_type("dtype", self.dtype, DataType)
        tensor_nbytes(check_sequence("shape", self.shape, int), self.dtype)

    def __repr__(self) -> str:
        return f"TensorDesc(dtype={self.dtype}, shape={self.shape})"


@final
class Tensor:
    """An array of numpy's with a data type of ours. Spec Appendix C.

    Made by `KvCacheManager.get_cache_tensors`, or from an array or another Tensor, whose memory it
    shares when that is contiguous. The elements are not converted: with a `tensor_desc` they must
    be of its type and as many as its shape has, without one it is that of the array.

    numpy has no BF16. A Tensor of it is made from the bits (uint16, shared), or from float32 or
    float16 (rounded to the nearest BF16, a copy).

    Raises TypeError for what is no array, or one of other elements than `tensor_desc` says;
    LLMException when their number does not fit its shape, and for DT_STRING.
    """

    def __init__(
        self, arr_or_tensor: Array | Tensor, tensor_desc: TensorDesc | None = None
    ) -> None:
        check_optional("tensor_desc", tensor_desc, TensorDesc)
        if isinstance(arr_or_tensor, Tensor):
            array, desc = arr_or_tensor._array, tensor_desc or arr_or_tensor._desc
        else:
            array = check_type("arr_or_tensor", arr_or_tensor, np.ndarray)
            desc = tensor_desc or _desc_of(array)
        self._desc: TensorDesc = desc
        self._array: Array = _shaped(_stored(array, desc.dtype), desc)

    def __repr__(self) -> str:
        return f"Tensor({self._desc})"

    @property
    def tensor_desc(self) -> TensorDesc:
        """The type and shape of this tensor."""
        return self._desc

    def numpy(self) -> Array:
        """The tensor as an array that shares its memory; BF16 as a copy in float32.

        What is written to a shared array is written to the tensor, and to the cache it belongs to.
        """
        return _widened(self._array) if self._desc.dtype is DataType.DT_BF16 else self._array


def _desc_of(array: Array) -> TensorDesc:
    dtype = np_dtype_to_dtype.get(array.dtype)
    if dtype is None:
        raise TypeError(f"no DataType is numpy's {array.dtype}: give a tensor_desc")
    return TensorDesc(dtype, array.shape)


def _stored(array: Array, dtype: DataType) -> Array:
    """`array` with elements as the memory of a cache has them."""
    if dtype is DataType.DT_BF16 and array.dtype in (np.float32, np.float16):
        return _rounded(array.astype(np.float32))
    wanted = storage_type(dtype)
    if array.dtype != wanted:
        raise TypeError(f"{dtype} needs an array of {wanted.__name__}, got {array.dtype}")
    return array


def _shaped(array: Array, desc: TensorDesc) -> Array:
    if array.size != math.prod(desc.shape):
        raise invalid(f"an array of shape {array.shape} does not fill the shape {desc.shape}")
    return array.reshape(desc.shape)


def _widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """BF16 is the upper half of a float32."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """To nearest, ties to even, as the frameworks do; a NaN stays one."""
    bits = values.view(np.uint32)
    is_even = (bits >> np.uint32(16)) & np.uint32(1)
    nearest = (bits + np.uint32(0x7FFF) + is_even) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, nearest).astype(np.uint16)
