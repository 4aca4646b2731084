"""What the elements of each data type are called in numpy and torch."""

from __future__ import annotations

from llm_datadist import DataType

NAMES = {
    DataType.DT_FLOAT: "float32",
    DataType.DT_FLOAT16: "float16",
    DataType.DT_INT8: "int8",
    DataType.DT_INT32: "int32",
    DataType.DT_UINT8: "uint8",
    DataType.DT_INT16: "int16",
    DataType.DT_UINT16: "uint16",
    DataType.DT_UINT32: "uint32",
    DataType.DT_INT64: "int64",
    DataType.DT_UINT64: "uint64",
    DataType.DT_DOUBLE: "float64",
    DataType.DT_BOOL: "bool",
    DataType.DT_BF16: "bfloat16",
}


def numpy_name(data_type: DataType) -> str:
    """numpy has the bits of a BF16."""
    return "uint16" if data_type is DataType.DT_BF16 else NAMES[data_type]
