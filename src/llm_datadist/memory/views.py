"""Arrays of numpy over memory that is found by address."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.data_type import dtype_to_np_dtype
from llm_datadist.errors import invalid
from llm_datadist.types import DataType

if TYPE_CHECKING:
    import numpy.typing as npt


def held_bytes(addr: int, nbytes: int, *held: object) -> npt.NDArray[np.uint8]:
    """The memory there; the array, and whatever is made of it, holds `held`."""
    return np.asarray(_HeldBytes(addr, nbytes, held))


def storage_type(data_type: DataType) -> type[np.generic]:
    """The type in which numpy sees memory of a data type; the bits of a BF16. Raises LLMException.

    Only DT_STRING has none.
    """
    if data_type is DataType.DT_BF16:
        return np.uint16
    if data_type not in dtype_to_np_dtype:
        raise invalid(f"numpy has no type for {data_type}")
    return dtype_to_np_dtype[data_type]


class _HeldBytes:
    """Arrays made of it keep this object, and so what it holds."""

    def __init__(self, addr: int, nbytes: int, held: tuple[object, ...]) -> None:
        self._held = held
        self.__array_interface__ = {
            "data": (addr, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }
