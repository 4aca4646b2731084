"""DLPack: how libraries hand tensors to each other without a copy, and without knowing each other.

A producer makes a capsule: a pointer to a C struct that says where a tensor lies. The memory is
kept until the capsule goes. numpy reads and makes capsules, but none of bfloat16; so what it cannot
do is done here, on the struct itself (https://dmlc.github.io/dlpack/latest/c_api.html).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final, Protocol

#: device types whose memory is process memory: kDLCPU, kDLCUDAHost and kDLROCMHost (both pinned)
HOST_DEVICES: Final = frozenset({1, 3, 11})
CPU: Final = (1, 0)

_VERSION: Final = (1, 0)
_CODES: Final = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
#: types of 8 bits, each a code of its own
_FLOAT8: Final = {
    7: "float8_e3m4",
    8: "float8_e4m3",
    9: "float8_e4m3b11fnuz",
    10: "float8_e4m3fn",
    11: "float8_e4m3fnuz",
    12: "float8_e5m2",
    13: "float8_e5m2fnuz",
    14: "float8_e8m0fnu",
}
#: the names of 8-bit numbers in torch and ml_dtypes; numpy itself has none of them
FLOAT8_NAMES: Final = frozenset(_FLOAT8.values())
_BFLOAT: Final = 4
_READ_ONLY: Final = 1


class SupportsDLPack(Protocol):
    """A tensor of numpy, torch, jax, cupy, …: whatever can be handed on by DLPack."""

    def __dlpack__(self) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


@dataclass(frozen=True, slots=True)
class Region:
    """Where a tensor lies, and what its library says about it."""

    addr: int
    element: str  #: the type of the elements by its name in numpy, torch and jax: "bfloat16"
    shape: tuple[int, ...]
    is_contiguous: bool
    is_writable: bool
    #: keeps the memory
    held: object


class _Tensor(ctypes.Structure):
    """DLTensor. A DLManagedTensor begins with it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# Prototypes of our own: those of `ctypes.pythonapi` are everybody's.
_is_capsule = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def region_of(producer: SupportsDLPack) -> Region:
    """Where a producer's tensor lies; the region holds its capsule. Only for HOST_DEVICES.

    Raises BufferError, or whatever else the producer says that it cannot be exported with.
    """
    export: Any = producer.__dlpack__
    try:
        capsule = export(max_version=_VERSION, copy=False)
    except TypeError:  # a producer of before these arguments, which does not copy
        capsule = export()
    tensor, flags = _open(capsule)
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    return Region(
        (tensor.data or 0) + tensor.byte_offset,
        _name_of(tensor.code, tensor.bits, tensor.lanes),
        shape,
        strides is None or _is_contiguous(shape, strides),
        not flags & _READ_ONLY,
        capsule,
    )


def mark_bfloat16(capsule: object) -> None:
    """Makes a capsule of 16-bit elements, which nobody has used yet, one of bfloat16."""
    _open(capsule)[0].code = _BFLOAT


def _open(capsule: object) -> tuple[Any, int]:
    """The tensor of a capsule that nobody has used yet, and its flags."""
    name = b"dltensor_versioned"
    if not _is_capsule(capsule, name):  # ValueError for what is no capsule at all
        return _Tensor.from_address(_pointer_of(capsule, b"dltensor")), 0
    managed: Any = _Versioned.from_address(_pointer_of(capsule, name))
    if managed.major > _VERSION[0]:
        raise BufferError(f"its DLPack version {managed.major}.{managed.minor} is too new")
    return managed.tensor, managed.flags


def _name_of(code: int, bits: int, lanes: int) -> str:
    if code in _FLOAT8 and (bits, lanes) == (8, 1):
        return _FLOAT8[code]
    if code not in _CODES or lanes != 1:
        return f"DLPack's type {code} ({lanes} of {bits} bits)"
    kind = _CODES[code]
    return kind if kind == "bool" and bits == 8 else f"{kind}{bits}"


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for dim, stride in zip(reversed(shape), reversed(strides), strict=True):
        if dim != 1 and stride != expected:
            return False
        expected *= dim
    return True
