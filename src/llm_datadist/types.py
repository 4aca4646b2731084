"""Enums and descriptions: plain values that users make and pass around. Spec 3.3-3.7."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, cast, final

from llm_datadist.checks import (
    INT64_MAX,
    check_int32,
    check_int64_sequence,
    check_optional,
    check_sequence,
    check_type,
    check_uint32,
)
from llm_datadist.errors import invalid
from llm_datadist.named_enum import NamedIntEnum

if TYPE_CHECKING:
    from collections.abc import Iterable


class LLMRole(NamedIntEnum):
    """What a cluster is for. A label: every role may pull, push and listen. Spec 1, 3.3."""

    PROMPT = 1  #: prefill
    DECODER = 2
    MIX = 3


class Placement(NamedIntEnum):
    """Which memory a cache lies in. Spec 3.3."""

    HOST = 0
    DEVICE = 1


class Memtype(Enum):
    """Which memory a range lies in; numbered the other way round than Placement. Spec 3.3."""

    MEM_TYPE_DEVICE = 0
    MEM_TYPE_HOST = 1


class RegisterMemStatus(Enum):
    """How far a rank-table link has come. Spec 3.3, 5.8."""

    OK = 0
    PREPARING = 1
    FAILED = 2


class DataType(Enum):
    """The type of a tensor's elements. Spec 3.5."""

    DT_FLOAT = 0
    DT_FLOAT16 = 1
    DT_INT8 = 2
    DT_INT32 = 3
    DT_UINT8 = 4
    DT_INT16 = 6
    DT_UINT16 = 7
    DT_UINT32 = 8
    DT_INT64 = 9
    DT_UINT64 = 10
    DT_DOUBLE = 11
    DT_BOOL = 12
    DT_STRING = 13
    DT_BF16 = 27

    @property
    def itemsize(self) -> int:
        """Bytes of one element; a string counts as its 16-byte handle. Spec 3.5."""
        return _ITEMSIZES[self]


_ITEMSIZES: Final = {
    DataType.DT_FLOAT: 4,
    DataType.DT_FLOAT16: 2,
    DataType.DT_INT8: 1,
    DataType.DT_INT32: 4,
    DataType.DT_UINT8: 1,
    DataType.DT_INT16: 2,
    DataType.DT_UINT16: 2,
    DataType.DT_UINT32: 4,
    DataType.DT_INT64: 8,
    DataType.DT_UINT64: 8,
    DataType.DT_DOUBLE: 8,
    DataType.DT_BOOL: 1,
    DataType.DT_STRING: 16,
    DataType.DT_BF16: 2,
}


def tensor_nbytes(shape: Iterable[int], data_type: DataType) -> int:
    """Bytes of one tensor; no dimensions at all make one element. Spec 3.5.

    Raises LLMException when a dimension is not positive or the product exceeds an int64.
    """
    dims = tuple(shape)
    if any(dim <= 0 for dim in dims):
        raise invalid(f"every dimension of a shape must be greater than 0, got {dims}")
    nbytes = math.prod(dims) * data_type.itemsize
    if nbytes > INT64_MAX:
        raise invalid(f"a tensor of shape {dims} and {data_type} has more than 2**63-1 bytes")
    return nbytes


@final
@dataclass(frozen=True, slots=True, repr=False)
class MemInfo:
    """A range of memory: `size` bytes from address `addr`. Spec 3.6.

    Raises TypeError for a wrong type. None passes, and so does any number: the call that takes the
    range checks it.
    """

    mem_type: Memtype
    addr: int
    size: int

    def __post_init__(self) -> None:
        check_optional("mem_type", self.mem_type, Memtype)
        check_optional("addr", self.addr, int)
        check_optional("size", self.size, int)

    def __repr__(self) -> str:
        return f"MemInfo(mem_type={self.mem_type}, addr={self.addr}, size={self.size})"


class CacheDesc:
    """What a cache looks like: `num_tensors` tensors of one shape and type. Spec 3.7.

    Dim 0 of the shape counts batch rows (continuous cache) or blocks (blocks cache), whatever
    `batch_dim_index` says (decision O5). Zero and negative dims are found out when the size is
    needed. A missing data type too: `data_type` None is accepted here, as in the reference.

    Raises TypeError for a wrong type, ValueError for a number that does not fit its width,
    LLMException when one of the indices points outside the shape.
    """

    def __init__(
        self,
        num_tensors: int,
        shape: list[int] | tuple[int, ...],
        data_type: DataType,
        placement: Placement = Placement.DEVICE,
        batch_dim_index: int = 0,
        seq_len_dim_index: int = -1,
        kv_tensor_format: str | None = None,
    ) -> None:
        self._num_tensors = check_uint32("num_tensors", num_tensors)
        self._shape = check_sequence("shape", shape, int)
        self._data_type = check_optional("data_type", data_type, DataType)
        self._placement = check_type("placement", placement, Placement)
        self._batch_dim_index = check_type("batch_dim_index", batch_dim_index, int)
        self._seq_len_dim_index = check_int32("seq_len_dim_index", seq_len_dim_index)
        self._kv_tensor_format = check_optional("kv_tensor_format", kv_tensor_format, str)
        self._check_index("batch_dim_index", self._batch_dim_index)
        if self._seq_len_dim_index != -1:
            self._check_index("seq_len_dim_index", self._seq_len_dim_index)
        check_int64_sequence("shape", shape)
        self._batch_size = self._shape[self._batch_dim_index]

    def _check_index(self, name: str, index: int) -> None:
        if not 0 <= index < len(self._shape):
            raise invalid(f"{name} must be in [0, {len(self._shape)}), got {index}")

    def __repr__(self) -> str:
        return (
            f"CacheDesc(num_tensors={self._num_tensors}, shape={self._shape}, "
            f"data_type={self._data_type}, placement={self._placement}, "
            f"batch_dim_index={self._batch_dim_index}, "
            # programs that compare the text know it without a blank here
            f"seq_len_dim_index={self._seq_len_dim_index},"
            f"kv_tensor_format={self._kv_tensor_format})"
        )

    @property
    def num_tensors(self) -> int:
        """How many tensors the cache has. Spec 3.7."""
        return self._num_tensors

    @property
    def shape(self) -> list[int] | tuple[int, ...]:
        """The shape of each tensor: the object that was passed in. Spec 3.7."""
        return self._shape

    @property
    def data_type(self) -> DataType:
        """The type of the elements. Spec 3.7."""
        # None is possible, see the class; whoever computes with it comes by `size`, which refuses
        return cast("DataType", self._data_type)

    @property
    def placement(self) -> Placement:
        """Which memory the cache lies in. Spec 3.7."""
        return self._placement

    @property
    def batch_dim(self) -> int:
        """The dimension that counts batch rows, as given. Spec 3.7."""
        return self._batch_dim_index

    @property
    def batch_size(self) -> int:
        """`shape[batch_dim]` at construction: `update_dim` does not change it. Spec 3.7."""
        return self._batch_size

    @property
    def seq_len_dim_index(self) -> int:
        """The dimension that counts tokens, -1 for none. No transfer reads it. Spec 3.7."""
        return self._seq_len_dim_index

    @property
    def kv_tensor_format(self) -> str | None:
        """A name for the layout of a tensor. Nothing reads it. Spec 3.7."""
        return self._kv_tensor_format

    @property
    def size(self) -> int:
        """Bytes of one tensor. Spec 3.7, decision O3.

        Raises LLMException when it cannot be computed: see `tensor_nbytes`.
        """
        if self._data_type is None:
            raise invalid("the cache has no size: its data_type is None")
        return tensor_nbytes(self._shape, self._data_type)

    def update_dim(self, dim_index: int, dim_value: int) -> None:
        """Set one dimension, in the object that was passed as shape. Spec 3.7.

        Raises TypeError when that is a tuple, IndexError when there is no such dimension.
        """
        check_type("the shape of update_dim", self._shape, list)[dim_index] = dim_value
