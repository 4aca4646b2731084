"""The pools of a cluster: which memory allocated caches come from. Spec 8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.memory.arena import MemoryPool
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from llm_datadist.memory.device import Device
    from llm_datadist.options import Options


def open_pools(options: Options, device: Device) -> dict[Placement, MemoryPool]:
    """The pools that the options configure, all on `device`.

    Raises LLMException(LLM_OUT_OF_MEMORY).
    """
    pools: dict[Placement, MemoryPool] = {}
    if options.buf_pool is not None:
        pools[Placement.DEVICE] = MemoryPool.of_slots(options.buf_pool, options.device_pool, device)
    elif options.device_pool is not None:
        pools[Placement.DEVICE] = MemoryPool.of_pages(options.device_pool, device)
    if options.host_pool is not None:
        pools[Placement.HOST] = MemoryPool.of_pages(options.host_pool, device)
    return pools
