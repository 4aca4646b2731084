"""Import path of existing programs: DataType, and what it is in numpy. Spec 2.2."""

from __future__ import annotations

import numpy as np

from llm_datadist.types import DataType

__all__ = ["DataType", "dtype_to_np_dtype", "np_dtype_to_dtype", "valid_np_dtypes"]

#: numpy's type of each data type; DT_BF16 and DT_STRING have none
dtype_to_np_dtype: dict[DataType, type[np.generic]] = {
    DataType.DT_FLOAT: np.float32,
    DataType.DT_FLOAT16: np.float16,
    DataType.DT_INT8: np.int8,
    DataType.DT_INT32: np.int32,
    DataType.DT_UINT8: np.uint8,
    DataType.DT_INT16: np.int16,
    DataType.DT_UINT16: np.uint16,
    DataType.DT_UINT32: np.uint32,
    DataType.DT_INT64: np.int64,
    DataType.DT_UINT64: np.uint64,
    DataType.DT_DOUBLE: np.float64,
    DataType.DT_BOOL: np.bool_,
}

#: numpy types that have a data type; `array.dtype` is found too, since it compares equal to one
valid_np_dtypes: list[type[np.generic]] = list(dtype_to_np_dtype.values())

#: the way back, from `np.float32` as well as from `array.dtype`: they are equal, their hashes not
np_dtype_to_dtype: dict[type[np.generic] | np.dtype[np.generic], DataType] = {
    **{np_type: data_type for data_type, np_type in dtype_to_np_dtype.items()},
    **{np.dtype(np_type): data_type for data_type, np_type in dtype_to_np_dtype.items()},
}
