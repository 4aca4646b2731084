"""Element types that only C++ programs use, and the size of what is made of them. Spec 3.5."""

from __future__ import annotations

from typing import Final

from llm_datadist.checks import check_type
from llm_datadist.errors import invalid
from llm_datadist.named_enum import NamedIntEnum
from llm_datadist.types import DataType, tensor_nbytes


class GeDataType(NamedIntEnum):
    """The values of `ge::DataType` that `DataType` does not have. Spec 3.5.

    Those without a size (DT_RESOURCE, DT_DUAL, DT_VARIANT, DT_UNDEFINED) can be named, but no cache
    can be made of them.
    """

    DT_DUAL_SUB_INT8 = 14
    DT_DUAL_SUB_UINT8 = 15
    DT_COMPLEX64 = 16
    DT_COMPLEX128 = 17
    DT_QINT8 = 18
    DT_QINT16 = 19
    DT_QINT32 = 20
    DT_QUINT8 = 21
    DT_QUINT16 = 22
    DT_RESOURCE = 23
    DT_STRING_REF = 24
    DT_DUAL = 25
    DT_VARIANT = 26
    DT_UNDEFINED = 28
    DT_INT4 = 29
    DT_UINT1 = 30
    DT_INT2 = 31
    DT_UINT2 = 32
    DT_COMPLEX32 = 33
    DT_HIFLOAT8 = 34
    DT_FLOAT8_E5M2 = 35
    DT_FLOAT8_E4M3FN = 36
    DT_FLOAT8_E8M0 = 37
    DT_FLOAT6_E3M2 = 38
    DT_FLOAT6_E2M3 = 39
    DT_FLOAT4_E2M1 = 40
    DT_FLOAT4_E1M2 = 41


_BITS: Final = {
    GeDataType.DT_DUAL_SUB_INT8: 8,
    GeDataType.DT_DUAL_SUB_UINT8: 8,
    GeDataType.DT_COMPLEX64: 64,
    GeDataType.DT_COMPLEX128: 128,
    GeDataType.DT_QINT8: 8,
    GeDataType.DT_QINT16: 16,
    GeDataType.DT_QINT32: 32,
    GeDataType.DT_QUINT8: 8,
    GeDataType.DT_QUINT16: 16,
    GeDataType.DT_STRING_REF: 128,
    GeDataType.DT_INT4: 4,
    GeDataType.DT_UINT1: 1,
    GeDataType.DT_INT2: 2,
    GeDataType.DT_UINT2: 2,
    GeDataType.DT_COMPLEX32: 32,
    GeDataType.DT_HIFLOAT8: 8,
    GeDataType.DT_FLOAT8_E5M2: 8,
    GeDataType.DT_FLOAT8_E4M3FN: 8,
    GeDataType.DT_FLOAT8_E8M0: 8,
    GeDataType.DT_FLOAT6_E3M2: 6,
    GeDataType.DT_FLOAT6_E2M3: 6,
    GeDataType.DT_FLOAT4_E2M1: 4,
    GeDataType.DT_FLOAT4_E1M2: 4,
}


def nbytes_of(shape: list[int] | tuple[int, ...], data_type: object) -> int:
    """Bytes of one tensor; elements below a byte are packed. Spec 3.5.

    Raises TypeError when `data_type` is none; LLMException for a type without a size, for dims that
    are not positive, and when a row of dim 0, which transfers move, is no whole number of bytes.
    """
    kind = check_type("data_type", data_type, DataType, GeDataType)
    if isinstance(kind, DataType):
        return tensor_nbytes(shape, kind)
    bits = _BITS.get(kind)
    if bits is None:
        raise invalid(f"no cache can be made of {kind}: set the description's data_type")
    count = tensor_nbytes(shape, DataType.DT_INT8)
    rows = shape[0] if shape else 1
    if rows > 1 and count // rows * bits % 8:
        raise invalid(f"a row of {count // rows} elements of {kind} ends within a byte")
    return -(-count * bits // 8)
