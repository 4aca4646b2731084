"""Cache: what a cache manager hands out. Spec 3.8."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from llm_datadist.checks import check_int64, check_list, check_object
from llm_datadist.errors import invalid
from llm_datadist.types import CacheDesc, Placement

if TYPE_CHECKING:
    from llm_datadist.cache_manager import CacheManager


@final
class Cache:
    """A group of equal tensors that can be moved. Spec 3.8.

    Made by the methods of CacheManager, and by `create_cpu_cache`. The object owns nothing: memory
    is neither freed nor kept when it goes. Caches compare by identity.
    """

    def __init__(
        self,
        cache_id: int,
        cache_desc: CacheDesc,
        tensor_addrs: list[int],
        cache_manager: CacheManager | None,
        is_registered: bool,
        is_blocks_cache: bool,
    ) -> None:
        self._cache_id = check_int64("cache_id", cache_id)
        self._cache_desc = cache_desc
        self._tensor_addrs = tensor_addrs
        self._cache_manager = cache_manager
        self._is_registered = is_registered
        self._is_blocks_cache = is_blocks_cache
        self._valid = True

    @classmethod
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: list[int]) -> Cache:
        """A blocks cache over host memory of the caller's, for `swap_blocks` only. Spec 3.8.

        `addrs` has one address per tensor. The memory is not registered: nobody can pull it.

        Raises TypeError when `addrs` is no list of int, AttributeError when `cache_desc` is None,
        LLMException when its placement is not HOST or the number of addresses not `num_tensors`.
        """
        addrs = check_list("addrs", addrs, int)
        desc = check_object("cache_desc", cache_desc, CacheDesc)
        if desc.placement != Placement.HOST:
            raise invalid(f"the placement of a cpu cache must be HOST, got {desc.placement}")
        if len(addrs) != desc.num_tensors:
            raise invalid(f"{desc.num_tensors} tensors need as many addrs, got {len(addrs)}")
        return cls(-1, desc, addrs, None, is_registered=False, is_blocks_cache=True)

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

    def _forget_memory(self) -> None:
        """For the cache manager: the memory is no longer this cache's. May be called again."""
        self._tensor_addrs = []
        self._valid = False
