"""Tensors of other libraries as the memory of a cache: where they lie, and whether they fit it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llm_datadist.checks import check_list, check_type
from llm_datadist.errors import LLMException, invalid
from llm_datadist.memory import dlpack
from llm_datadist.memory.views import storage_type
from llm_datadist.types import DataType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.memory.dlpack import SupportsDLPack
    from llm_datadist.types import CacheDesc

_DEVICE_NAMES = {2: "CUDA", 10: "ROCm", 13: "CUDA managed"}
#: what producers say with that a tensor cannot be exported; the standard has BufferError
_EXPORT_ERRORS = (BufferError, RuntimeError, TypeError, ValueError)


#: what FP8 is described as: the reference has no type for it
_BYTES = (DataType.DT_INT8, DataType.DT_UINT8)


class Located(NamedTuple):
    """The memory of a cache."""

    #: one for each tensor
    addrs: list[int]
    #: what keeps the memory at each address; None where the program itself does
    held: Sequence[object | None]


def is_tensor(value: object) -> bool:
    """Whether `value` knows where it lies. torch, cupy, … need not be imported to find out."""
    return hasattr(value, "__dlpack_device__") or hasattr(value, "__cuda_array_interface__")


def check_addrs(addrs: object) -> None:
    """`addrs` is a list of addresses and tensors, or one tensor. Raises TypeError."""
    if not is_tensor(addrs):
        given: list[object] = check_type("addrs", addrs, list)
        check_list("addrs", [each for each in given if not is_tensor(each)], int)


def locate(addrs: list[Any] | SupportsDLPack, desc: CacheDesc) -> Located:
    """Where the tensors of a cache lie, after `check_addrs`. What an address means is not checked.

    Raises LLMException(LLM_PARAM_INVALID) for a tensor that does not fit the description.
    """
    if not isinstance(addrs, list):
        whole = _fitting("addrs", addrs, desc, desc.num_tensors)
        starts = [whole.addr + index * desc.size for index in range(desc.num_tensors)]
        return Located(starts, [whole.held] * desc.num_tensors)
    found = [
        (each, None) if isinstance(each, int) else _fitting_one(f"addrs[{index}]", each, desc)
        for index, each in enumerate(addrs)
    ]
    return Located([addr for addr, _ in found], [held for _, held in found])


def _fitting_one(name: str, tensor: SupportsDLPack, desc: CacheDesc) -> tuple[int, object]:
    region = _fitting(name, tensor, desc, 1)
    return region.addr, region.held


def _fitting(name: str, tensor: SupportsDLPack, desc: CacheDesc, count: int) -> dlpack.Region:
    """The memory of `count` tensors of a cache, if this is one that they can have."""
    _check_device(name, tensor)
    region = _region_of(name, tensor)
    elements = _elements_of(desc)
    is_bits = region.element in dlpack.FLOAT8_NAMES and desc.data_type in _BYTES
    if region.element not in elements and not is_bits:
        raise invalid(
            f"{name} has elements of {region.element}, {desc.data_type} needs "
            f"{' or '.join(elements)}: view the tensor as that, or describe it as it is"
        )
    shape = (count, *desc.shape) if count > 1 else tuple(desc.shape)
    if math.prod(region.shape) * desc.data_type.itemsize != count * desc.size:
        raise invalid(f"{name} of shape {region.shape} does not fill the shape {shape}")
    if not region.is_contiguous:
        raise invalid(f"{name} is not contiguous: a tensor of a cache is one range of memory")
    if not region.is_writable:
        raise invalid(f"{name} is read-only: a cache is written to, by pulls, pushes and copies")
    return region


def _check_device(name: str, tensor: SupportsDLPack) -> None:
    """Memory of an accelerator gets through here once there is a path for it."""
    where = "CUDA"
    if hasattr(tensor, "__dlpack_device__"):  # if not, there is a __cuda_array_interface__
        try:
            device_type, device_id = map(int, tensor.__dlpack_device__())
        except _EXPORT_ERRORS as error:
            raise _unusable(name, error) from error
        if device_type in dlpack.HOST_DEVICES:
            return
        kind = _DEVICE_NAMES.get(device_type, f"a device of DLPack's type {device_type}")
        where = f"{kind}, device {device_id}"
    raise invalid(
        f"{name} lies on {where}, and only process memory can be a cache so far, whatever the "
        "placement: pass a tensor on the CPU"
    )


def _region_of(name: str, tensor: SupportsDLPack) -> dlpack.Region:
    if isinstance(tensor, np.ndarray):  # numpy's own DLPack leaves bfloat16 and old versions out
        flags = tensor.flags
        return dlpack.Region(
            tensor.ctypes.data,
            str(tensor.dtype),
            tensor.shape,
            flags.c_contiguous,
            flags.writeable,
            tensor,
        )
    try:
        return dlpack.region_of(tensor)
    except LLMException:  # a tensor of a cache that is gone
        raise
    except _EXPORT_ERRORS as error:
        raise _unusable(name, error) from error


def _unusable(name: str, error: Exception) -> LLMException:
    return invalid(f"{name} cannot be exported: {error}")


def _elements_of(desc: CacheDesc) -> list[str]:
    """The types that the elements may have by name; numpy has BF16 as its bits, or by ml_dtypes."""
    own = ["bfloat16"] if desc.data_type is DataType.DT_BF16 else []
    return [*own, np.dtype(storage_type(desc.data_type)).name]
