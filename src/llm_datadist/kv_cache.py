"""KvCache: what the cache manager of the v1 mode hands out. Spec 3.8, Appendix C."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Protocol, cast, final

from llm_datadist.cache import Cache
from llm_datadist.checks import check_type
from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from llm_datadist.types import CacheDesc


class Collector(Protocol):
    """Who frees caches that nobody holds any more: their KvCacheManager."""

    def _collect(self, cache_id: int) -> None:
        """Nobody holds the cache any more. Takes no lock."""
        ...


@final
class KvCache:
    """A cache of the v1 mode: a Cache that is deallocated when nobody holds it. Spec 3.8.

    Made by the methods of KvCacheManager, and by `create_cpu_cache`. Nobody holds it when the
    object, the arrays of its tensors and the transfers that send it are all gone; keys keep the
    memory beyond that, as they do beyond `KvCacheManager.deallocate_cache`. Caches compare by
    identity.
    """

    def __init__(self, cache: Cache, manager: Collector | None) -> None:
        self._cache = cache
        self._manager = manager
        #: as it was allocated: `CacheDesc.update_dim` may change the description since
        self._shape = tuple(cache.cache_desc.shape)
        #: on each device
        self._num_tensors = cache.cache_desc.num_tensors
        #: on how many it is; the addresses of the second follow those of the first
        self._num_devices = len(cache.tensor_addrs) // self._num_tensors if self._num_tensors else 1
        # Not __del__: a transfer keeps the inner cache only, and must go on.
        self._finalizer: weakref.finalize[[int], Cache] | None = None
        if manager is not None:
            self._finalizer = weakref.finalize(cache, manager._collect, cache.cache_id)
            self._finalizer.atexit = False  # LLMDataDist is finalized then, and all memory freed

    @classmethod
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: list[int] | list[list[int]]) -> KvCache:
        """A blocks cache over host memory of the caller's, for `swap_blocks` only. Spec 3.8.

        `addrs` has one address per tensor, or for each device a list of them. The memory stays the
        caller's.

        Raises TypeError when `addrs` is no list of int, AttributeError when `cache_desc` is None,
        LLMException when its placement is not HOST, or the number of addresses not `num_tensors`.
        """
        each = [Cache.create_cpu_cache(cache_desc, listed) for listed in _of_each_device(addrs)]
        joined = [addr for cache in each for addr in cache.tensor_addrs]
        cache = Cache(-1, cache_desc, joined, None, is_registered=False, is_blocks_cache=True)
        return cls(cache, None)

    def __repr__(self) -> str:
        return (
            f"KvCache(cache_id = {self.cache_id}, "
            f"device_tensor_addrs = {len(self._cache.tensor_addrs)}, "
            f"is_blocks_cache = {self._cache.is_blocks_cache})"
        )

    @property
    def cache_id(self) -> int:
        """The id, by which peers may name the cache too; -1 for a cpu cache. Spec 3.8."""
        return self._cache.cache_id

    @property
    def cache_desc(self) -> CacheDesc:
        """The description: the object that was passed in. Spec 3.8."""
        return self._cache.cache_desc

    @property
    def per_device_tensor_addrs(self) -> list[list[int]]:
        """For each device, the address of each tensor; none after deallocation. Spec 3.8."""
        if self._num_devices == 1:
            return [self._cache.tensor_addrs]
        addrs, count = self._cache.tensor_addrs, self._num_tensors
        return [addrs[i * count : (i + 1) * count] for i in range(self._num_devices)]

    def _is_allocated(self) -> bool:
        """For the manager: the memory is this cache's, and neither a peer nor a key can end it."""
        return self._finalizer is not None and self._finalizer.alive

    def _let_go(self) -> bool:
        """For the manager: whether the id's reference is still to be dropped; true once."""
        return self._finalizer is not None and self._finalizer.detach() is not None


def _of_each_device(addrs: object) -> list[list[int]]:
    """The addresses on each device, of which there is one where they are in no list of lists."""
    given: list[object] = check_type("addrs", addrs, list)
    nested = [each for each in given if isinstance(each, list)]
    if len(nested) not in (0, len(given)):
        raise invalid("the elements of addrs should be consistent: all of them int, or all list")
    if not given or [] in nested:
        raise invalid("addrs is empty: give one address per tensor")
    return cast("list[list[int]]", nested or [given])  # Cache looks inside
