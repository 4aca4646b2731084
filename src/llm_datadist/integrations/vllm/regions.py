"""vLLM's KV tensors as blocks in memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llm_datadist import CacheDesc
from llm_datadist.integrations.vllm.forms import Form

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from llm_datadist import BlocksCacheKey, KVLayout
    from llm_datadist.cache import Cache
    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.integrations.vllm.forms import Plane
    from llm_datadist.integrations.vllm.groups import Group


@dataclass
class Region:
    """Layers of one group that are alike: as many blocks of as many bytes, as far apart."""

    #: which of the groups
    group: int
    form: Form
    num_blocks: int
    block_nbytes: int
    #: from one block to the next
    stride_nbytes: int
    layers: list[str] = field(default_factory=list)
    addrs: list[int] = field(default_factory=list)

    def of_layer(self, layer: str) -> Region:
        """That layer alone."""
        addr = self.addrs[self.layers.index(layer)]
        return replace(self, layers=[layer], addrs=[addr])

    def register(self, manager: CacheManager, key: BlocksCacheKey | None) -> Cache:
        """Makes the region known under this key, by blocks as they are. None: to us alone."""
        layout = self.form.whole(
            self.layers, self.num_blocks, self.block_nbytes, self.stride_nbytes
        )
        return _registered(manager, self.addrs, layout, key)

    def register_plane(
        self, manager: CacheManager, plane: Plane, key: BlocksCacheKey | None
    ) -> Cache:
        """The same of one plane, by tokens."""
        layout = self.form.by_token(plane, self.layers, self.num_blocks, self.stride_nbytes)
        addrs = self.form.plane_addrs(plane, self.addrs, self.block_nbytes)
        return _registered(manager, addrs, layout, key)

    def nbytes(self, num_blocks: int) -> int:
        """Of so many blocks, in all layers."""
        return num_blocks * self.block_nbytes * len(self.addrs)


def regions_of(
    kv_caches: Mapping[str, torch.Tensor],
    num_blocks: int,
    groups: Sequence[Group],
    forms: Mapping[str, Form],
) -> list[Region]:
    """Finds the blocks of each layer, by group: groups may lie in the same memory.

    A tensor counts blocks in its first dimension; they may be the kernel's, of which several make
    one of the scheduler's, and then it is only known by its bytes. Of what lies between blocks
    nothing is moved. `forms` are by layer; without one a layer is known by its bytes.

    Raises ValueError that names the layer and what about it cannot be moved.
    """
    regions: dict[tuple[object, ...], Region] = {}
    for index, group in enumerate(groups):
        seen: set[int] = set()
        for layer in group.layers:
            if layer not in kv_caches:
                raise ValueError(f"there is no KV cache of {layer}")
            tensor = kv_caches[layer]
            addr, block_nbytes, stride_nbytes = _blocks_of(layer, tensor, num_blocks)
            form = forms.get(layer, Form()) if len(tensor) == num_blocks else Form()
            region = regions.setdefault(
                (index, form, block_nbytes, stride_nbytes),
                Region(index, form, num_blocks, block_nbytes, stride_nbytes),
            )
            if addr not in seen:
                seen.add(addr)
                region.layers.append(layer)
                region.addrs.append(addr)
    return list(regions.values())


def _registered(
    manager: CacheManager, addrs: list[int], layout: KVLayout, key: BlocksCacheKey | None
) -> Cache:
    desc = CacheDesc(len(addrs), [1, layout.nbytes // layout.data_type.itemsize], layout.data_type)
    return manager.register_blocks_cache(desc, addrs, key, layout=layout)


def _blocks_of(layer: str, tensor: torch.Tensor, num_blocks: int) -> tuple[int, int, int]:
    """The address of the first of the scheduler's blocks, its size, and how far the next is."""
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
    between = stride_nbytes - nbytes
    return tensor.data_ptr(), per_block * stride_nbytes - between, per_block * stride_nbytes
