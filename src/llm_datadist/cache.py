"""Cache: what a cache manager hands out. Spec 3.8."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, final

from llm_datadist.checks import check_int64, check_object
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.types import CacheDesc, Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt
    import torch

    from llm_datadist.cache_tensor import CacheTensor
    from llm_datadist.kv_layout import KVLayout
    from llm_datadist.memory.dlpack import SupportsDLPack

T = TypeVar("T", bound="int | SupportsDLPack")


class TensorFinder(Protocol):
    """Who knows where the tensors of a cache lie: its cache manager."""

    def _find_bytes(self, cache_id: int, index: int) -> npt.NDArray[np.uint8]:
        """The memory of a tensor; the array holds it."""
        ...


@final
class Cache:
    """A group of equal tensors that can be moved. Spec 3.8.

    Made by the methods of CacheManager, and by `create_cpu_cache`. The object owns nothing: memory
    is neither freed nor kept when it goes. Caches compare by identity.

    An addition to the reference: `tensors`, `numpy()` and `torch()` show the memory to the program
    without a copy, one tensor each of `cache_desc.shape`.
    """

    def __init__(
        self,
        cache_id: int,
        cache_desc: CacheDesc,
        tensor_addrs: list[int],
        cache_manager: TensorFinder | None,
        is_registered: bool,
        is_blocks_cache: bool,
        layout: KVLayout | None = None,
    ) -> None:
        self._cache_id = check_int64("cache_id", cache_id)
        self._cache_desc = cache_desc
        self._tensor_addrs = tensor_addrs
        self._cache_manager = cache_manager
        self._is_registered = is_registered
        self._is_blocks_cache = is_blocks_cache
        self._layout = layout
        self._valid = True
        #: as it was made: `CacheDesc.update_dim` may change the description since
        self._shape = tuple(cache_desc.shape)
        #: keeps the memory of a cpu cache
        self._held: Sequence[object] = ()

    @classmethod
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: list[T] | SupportsDLPack) -> Cache:
        """A blocks cache over host memory of the caller's, for `swap_blocks` only. Spec 3.8.

        `addrs` has one address or tensor per tensor, or is one tensor with all of them, as for
        `CacheManager.register_cache`; the cache keeps those tensors. The memory is not registered:
        nobody can pull it.

        Raises TypeError when `addrs` is none of that, AttributeError when `cache_desc` is None,
        LLMException when its placement is not HOST, the number of addresses not `num_tensors`, or
        a tensor does not fit.
        """
        from llm_datadist.memory.tensors import check_addrs, locate  # needs numpy

        check_addrs(addrs)
        desc = check_object("cache_desc", cache_desc, CacheDesc)
        if desc.placement != Placement.HOST:
            raise invalid(f"the placement of a cpu cache must be HOST, got {desc.placement}")
        found = locate(addrs, desc)
        if len(found.addrs) != desc.num_tensors:
            raise invalid(f"{desc.num_tensors} tensors need as many addrs, got {len(found.addrs)}")
        cache = cls(-1, desc, found.addrs, None, is_registered=False, is_blocks_cache=True)
        cache._held = found.held
        return cache

    def __repr__(self) -> str:
        return (
            f"Cache(cache_id = {self._cache_id}, "
            f"device_tensor_addrs = {len(self._tensor_addrs)}, "
            f"is_blocks_cache = {self._is_blocks_cache})"
        )

    @property
    def cache_id(self) -> int:
        """The id, by which peers may name the cache too; -1 for a cpu cache. Spec 3.8."""
        return self._cache_id

    @property
    def cache_desc(self) -> CacheDesc:
        """The description: the object that was passed in. Spec 3.8."""
        return self._cache_desc

    @property
    def tensor_addrs(self) -> list[int]:
        """The address of each tensor; empty once the cache was deallocated. Spec 3.8."""
        return self._tensor_addrs

    @property
    def is_blocks_cache(self) -> bool:
        """Whether dim 0 of the shape counts blocks rather than batch rows. Spec 3.8."""
        return self._is_blocks_cache

    @property
    def layout(self) -> KVLayout | None:
        """What its blocks hold and where, as it was registered. An addition to the reference."""
        return self._layout

    @property
    def tensors(self) -> tuple[CacheTensor, ...]:
        """The tensors of the cache, one for each of `tensor_addrs`: zero-copy, for DLPack.

        What is made of one - an array, a tensor of torch, a capsule - is on the memory of the cache
        itself: pulls and peers see what is written there, and write there too. It holds that
        memory, which cannot be recycled under it: of an allocated cache that is deallocated
        meanwhile (or whose LLMDataDist is finalized) the memory goes back to the pool (or to the
        system) when the last one is gone. Nobody else sees it from then on.

        To make one raises LLMException: LLM_KV_CACHE_NOT_EXIST when the cache was deallocated or
        unregistered or its LLMDataDist finalized; LLM_PARAM_INVALID for a cache that was registered
        by addresses, for a cpu cache (both are memory that only the program knows how to keep), and
        for DT_STRING. Thread-safe. An addition to the reference.
        """
        from llm_datadist.cache_tensor import CacheTensor  # needs numpy

        return tuple(
            CacheTensor(self._shape, self._cache_desc.data_type, partial(self._find_bytes, index))
            for index in range(self._cache_desc.num_tensors)
        )

    def numpy(self) -> list[npt.NDArray[Any]]:
        """The tensors as writable arrays of `cache_desc.shape`, zero-copy; BF16 as bits (uint16).

        As `CacheTensor.numpy`; held memory and exceptions as `tensors`.
        """
        return [tensor.numpy() for tensor in self.tensors]

    def torch(self) -> list[torch.Tensor]:
        """The tensors as torch's on the CPU, of `cache_desc.shape`, zero-copy; BF16 as bfloat16.

        Held memory and exceptions as `tensors`; raises ImportError without torch.
        """
        return [tensor.torch() for tensor in self.tensors]

    def _find_bytes(self, index: int) -> npt.NDArray[np.uint8]:
        """The memory of a tensor; the array holds it."""
        if self._cache_manager is None:
            raise invalid(f"{self} is a cpu cache: its memory is the program's, not the library's")
        if not self._valid:
            raise LLMException(
                f"{self} was deallocated: make views of a cache before that, they keep its memory",
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )
        return self._cache_manager._find_bytes(self._cache_id, index)

    def _forget_memory(self) -> None:
        """For the cache manager: the memory is no longer this cache's. May be called again."""
        self._tensor_addrs = []
        self._valid = False
