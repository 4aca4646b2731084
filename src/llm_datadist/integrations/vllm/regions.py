"""vLLM's KV tensors as blocks in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llm_datadist import BlocksCacheKey, CacheDesc, DataType

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from llm_datadist.cache import Cache
    from llm_datadist.cache_manager import CacheManager


@dataclass
class Region:
    """Tensors that are alike: as many blocks of as many bytes, one after the other."""

    num_blocks: int
    block_nbytes: int
    layers: list[str] = field(default_factory=list)
    addrs: list[int] = field(default_factory=list)

    def register(self, manager: CacheManager, key: BlocksCacheKey) -> Cache:
        """Makes the region known under this key."""
        desc = CacheDesc(len(self.addrs), [self.num_blocks, self.block_nbytes], DataType.DT_UINT8)
        return manager.register_blocks_cache(desc, self.addrs, key)


def regions_of(kv_caches: Mapping[str, torch.Tensor], num_blocks: int) -> list[Region]:
    """Finds the blocks of each layer.

    A tensor counts blocks in its first dimension; they may be the kernel's, of which several make
    one of the scheduler's. Layers whose blocks lie interleaved in one memory share whole blocks.

    Raises ValueError that names the layer and what about it cannot be moved.
    """
    regions: dict[tuple[int, int], Region] = {}
    seen: dict[tuple[int, int], str] = {}
    for layer, tensor in kv_caches.items():
        addr, block_nbytes = _blocks_of(layer, tensor, num_blocks)
        region = regions.setdefault((num_blocks, block_nbytes), Region(num_blocks, block_nbytes))
        if (addr, block_nbytes) not in seen:
            seen[addr, block_nbytes] = layer
            region.layers.append(layer)
            region.addrs.append(addr)
    return list(regions.values())


def _blocks_of(layer: str, tensor: torch.Tensor, num_blocks: int) -> tuple[int, int]:
    """The address and size of the first of the scheduler's blocks."""
    if tensor.device.type != "cpu":
        raise ValueError(
            f"KV cache of {layer} is on {tensor.device}: this connector moves CPU memory only"
        )
    per_block, rest = divmod(tensor.shape[0], num_blocks)
    if rest or not per_block:
        raise ValueError(
            f"KV cache of {layer} has shape {tuple(tensor.shape)}: its first dimension should "
            f"count {num_blocks} blocks, or a multiple"
        )
    stride_nbytes, nbytes = tensor.stride(0) * tensor.itemsize, tensor[0].nbytes
    if not tensor[0].is_contiguous() or nbytes > stride_nbytes:
        raise ValueError(f"KV cache of {layer} has blocks that are not contiguous")
    addr = tensor.data_ptr()
    if nbytes < stride_nbytes:  # others' blocks lie between its own, from the memory's begin on
        begin = tensor.untyped_storage().data_ptr()
        if addr + nbytes > begin + stride_nbytes:
            raise ValueError(
                f"KV cache of {layer} has blocks of {stride_nbytes} bytes, which do "
                "not begin where its memory begins"
            )
        addr = begin
    return addr, per_block * stride_nbytes
