"""Caches with shards of one made-up model, in which each element says what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llm_datadist import BlocksCacheKey, CacheDesc, DataType, KVHeads, KVLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist import Cache
    from llm_datadist.testing.cluster import Node

LAYERS, HEADS, TOKENS, HEAD_SIZE = 2, 3, 21, 5
NUM_BLOCKS = 24

Elements = npt.NDArray[np.int32]


def model_kv() -> Elements:
    """What the model has computed: [layer, K or V, head, token, element]."""
    shape = (LAYERS, 2, HEADS, TOKENS, HEAD_SIZE)
    return np.arange(1, np.prod(shape) + 1, dtype=np.int32).reshape(shape)


def blocks_of(block_tokens: int, step: int = 5) -> list[int]:
    """Scattered blocks for the tokens."""
    return [step * index % NUM_BLOCKS for index in range(-(-TOKENS // block_tokens))]


class Shard:
    """A cache of a node with some of the model's heads."""

    def __init__(
        self,
        node: Node,
        order: str,
        block_tokens: int,
        heads: KVHeads,
        layers: Sequence[int] = range(LAYERS),
        key: BlocksCacheKey | None = None,
        readers: int = 0,
    ) -> None:
        sizes = {"B": NUM_BLOCKS, "H": heads.count, "N": block_tokens, "D": HEAD_SIZE}
        self.order, self.heads, self.layers = order, heads, list(layers)
        self.blocks, self.block_tokens = blocks_of(block_tokens), block_tokens
        shape = [sizes[axis] for axis in order]
        self.tensors: Elements = np.zeros((2 * len(layers), *shape), np.int32)
        desc = CacheDesc(2 * len(layers), shape, DataType.DT_INT32)
        layout = KVLayout.of(desc, order, heads=heads, layers=self.layers)
        self.cache: Cache = node.manager.register_blocks_cache(
            desc, self.tensors, key, layout=layout, readers=readers
        )

    def fill(self) -> None:
        for tensor, part in self._parts():
            tensor[...] = part

    def has_it_all(self) -> bool:
        """Whether the tokens' elements are the model's, and all others are as they were."""
        wrong = [1 for tensor, part in self._parts() if (tensor != part).any()]
        expected = len(self.layers) * 2 * self.heads.count * TOKENS * HEAD_SIZE
        return not wrong and np.count_nonzero(self.tensors) == expected

    def _parts(self) -> list[tuple[Elements, Elements]]:
        """Of each block: what it has of the tokens, and what it must have, as [head, token, D]."""
        kv, parts = model_kv(), []
        by_layer = self.tensors.transpose(0, *(1 + self.order.index(axis) for axis in "BHND"))
        heads = slice(self.heads.first, self.heads.stop)
        for index, block in enumerate(self.blocks):
            tokens = slice(index * self.block_tokens, (index + 1) * self.block_tokens)
            for place, layer in enumerate(self.layers):
                for which in (0, 1):
                    part = kv[layer, which, heads, tokens]
                    tensor = by_layer[2 * place + which, block]
                    parts.append((tensor[:, : part.shape[1]], part))
        return parts


#: those of a node in a process of its own
_shards: list[Shard] = []


def add_shard(
    node: Node,
    order: str,
    block_tokens: int,
    heads: KVHeads,
    layers: Sequence[int] = range(LAYERS),
    *,
    is_filled: bool = True,
    readers: int = 0,
) -> None:
    """In the peer's process, under its key."""
    key = BlocksCacheKey(node.datadist.cluster_id)
    shard = Shard(node, order, block_tokens, heads, layers, key, readers)
    if is_filled:
        shard.fill()
    _shards.append(shard)


def has_it_all(_: Node) -> bool:
    """Of the last shard that was added."""
    return _shards[-1].has_it_all()


def unregister(node: Node) -> None:
    """The last shard that was added."""
    node.manager.unregister_cache(_shards.pop().cache.cache_id)


def is_read(node: Node, within_s: float = 0.0) -> bool:
    """Of the last shard that was added."""
    return node.manager.wait_for_readers(_shards[-1].cache, within_s)
