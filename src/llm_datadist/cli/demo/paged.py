"""A paged KV cache, and the way between it and transformers' own cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from collections.abc import Sequence

_NBYTES_FLOAT32 = 4
#: room for the demo's longest prompt, and for shorter ones beside it
_NUM_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class PageShape:
    """How a model's KV cache lies in blocks."""

    num_layers: int
    block_tokens: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_tensors(self) -> int:
        """K and V of each layer."""
        return 2 * self.num_layers

    @property
    def block(self) -> tuple[int, int, int]:
        """The shape of one block of one tensor."""
        return (self.block_tokens, self.num_kv_heads, self.head_dim)

    @property
    def block_nbytes(self) -> int:
        """What one block takes, over all tensors."""
        tokens, heads, dim = self.block
        return self.num_tensors * tokens * heads * dim * _NBYTES_FLOAT32

    def num_blocks(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens need."""
        return -(-num_tokens // self.block_tokens)


class PagedCache:
    """The KV tensors of a model, cut into blocks: K, V, K, V, ..., layer by layer.

    A request's tokens lie in the blocks of its list, in the list's order; the last block may have
    room left. Memory that nothing was written to is NaN, so that reading it cannot go unnoticed.
    """

    def __init__(self, shape: PageShape, num_blocks: int) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self._tensors = [
            torch.full((num_blocks, *shape.block), torch.nan) for _ in range(shape.num_tensors)
        ]

    @classmethod
    def for_requests(cls, shape: PageShape) -> PagedCache:
        """A cache that holds a few of the demo's requests at a time."""
        return cls(shape, shape.num_blocks(_NUM_TOKENS))

    @property
    def addresses(self) -> list[int]:
        """Where the tensors are. They stay there as long as this object lives."""
        return [tensor.data_ptr() for tensor in self._tensors]

    def scatter(self, cache: DynamicCache, blocks: Sequence[int]) -> None:
        """Write what `cache` holds of its only request into `blocks`."""
        for index, layer in enumerate(cache.layers):
            self._write(2 * index, layer.keys, blocks)
            self._write(2 * index + 1, layer.values, blocks)

    def gather(self, blocks: Sequence[int], num_tokens: int) -> DynamicCache:
        """A cache of one request of `num_tokens` tokens, copied out of `blocks`."""
        cache = DynamicCache()
        for layer in range(self.shape.num_layers):
            keys = self._read(2 * layer, blocks, num_tokens)
            values = self._read(2 * layer + 1, blocks, num_tokens)
            cache.update(keys, values, layer)
        return cache

    def erase(self, blocks: Sequence[int]) -> None:
        """Make `blocks` unreadable, as if nothing had been written to them."""
        for tensor in self._tensors:
            tensor[blocks] = torch.nan

    # transformers: [request, head, token, dim]; blocks: [block, token, head, dim]

    def _write(self, index: int, states: torch.Tensor, blocks: Sequence[int]) -> None:
        rows = states[0].transpose(0, 1)
        tensor = self._tensors[index]
        for block, part in zip(blocks, rows.split(self.shape.block_tokens), strict=True):
            tensor[block, : len(part)] = part

    def _read(self, index: int, blocks: Sequence[int], num_tokens: int) -> torch.Tensor:
        rows = self._tensors[index][list(blocks)].flatten(0, 1)[:num_tokens]
        return rows.transpose(0, 1).unsqueeze(0).contiguous()
