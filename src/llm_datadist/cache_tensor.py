"""CacheTensor: one tensor of a cache, for the libraries that compute with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np

from llm_datadist.memory import dlpack
from llm_datadist.memory.views import storage_type
from llm_datadist.types import DataType

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    import torch
    from typing_extensions import CapsuleType


@final
class CacheTensor:
    """One tensor of a cache, as others see it: zero-copy, by DLPack. An addition to the reference.

    Obtained from `Cache.tensors`; goes wherever DLPack is understood (`torch.from_dlpack`,
    `jax.dlpack.from_dlpack`, `np.from_dlpack`, …), BF16 included where the library has that type.

    It holds nothing itself: each call finds the memory anew, and raises LLMException when the cache
    was freed (see `Cache.tensors`). What it returns holds the memory. Thread-safe.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        data_type: DataType,
        find_bytes: Callable[[], npt.NDArray[np.uint8]],
    ) -> None:
        self._shape = shape
        self._data_type = data_type
        self._find_bytes = find_bytes

    def __repr__(self) -> str:
        return f"CacheTensor(shape={self._shape}, data_type={self._data_type})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions, in elements: those of the cache's description when it was made."""
        return self._shape

    @property
    def data_type(self) -> DataType:
        """The type of the elements, which lie in row-major order without gaps."""
        return self._data_type

    def numpy(self) -> npt.NDArray[Any]:
        """The tensor as a writable array of `shape`, on the memory of the cache.

        numpy has no BF16: the array then has its bits, as uint16. `.view(ml_dtypes.bfloat16)`
        makes numbers of them, still without a copy.

        Raises LLMException as `Cache.tensors` says.
        """
        return self._find_bytes().view(storage_type(self._data_type)).reshape(self._shape)

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """What `np.asarray` makes of it: `numpy()`; the bits of a BF16, so no other type of those.

        Raises TypeError for another type of a BF16, ValueError when it cannot be without a copy.
        """
        array = self.numpy()
        if dtype is None or np.dtype(dtype) == array.dtype:
            return array.copy() if copy else array
        if self._data_type is DataType.DT_BF16:
            raise TypeError(f"numpy has no BF16 to make {np.dtype(dtype)} of: see numpy()")
        if copy is False:
            raise ValueError(f"{np.dtype(dtype)} needs a copy of {self._data_type}")
        return array.astype(dtype)

    def torch(self) -> torch.Tensor:
        """The tensor as one of torch's on the CPU, on the memory of the cache; BF16 as bfloat16.

        Raises ImportError without torch, LLMException as `Cache.tensors` says.
        """
        import torch

        tensor = torch.from_numpy(self.numpy())
        return tensor.view(torch.bfloat16) if self._data_type is DataType.DT_BF16 else tensor

    def __dlpack__(self, **request: object) -> CapsuleType:
        """A capsule over the memory of the cache; `request` is what numpy's takes."""
        array: Any = self.numpy()
        capsule: CapsuleType = array.__dlpack__(**request)
        if self._data_type is DataType.DT_BF16:
            dlpack.mark_bfloat16(capsule)
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        """Process memory, whatever the placement."""
        return dlpack.CPU
