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


def model_kv(tokens: int = TOKENS) -> Elements:
    """What the model has computed: [layer, K or V, head, token, element]."""
    shape = (LAYERS, 2, HEADS, tokens, HEAD_SIZE)
    return np.arange(1, np.prod(shape) + 1, dtype=np.int32).reshape(shape)


def blocks_of(block_tokens: int, tokens: int = TOKENS) -> list[int]:
    """Scattered blocks for the tokens."""
    count = -(-tokens // block_tokens)
    return [5 * index % num_blocks(count) for index in range(count)]


def num_blocks(count: int) -> int:
    """How many a cache has that holds so many of a sequence."""
    return max(NUM_BLOCKS, count + -count % 5 + 1)


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
        tokens: int = TOKENS,
    ) -> None:
        self.blocks, self.block_tokens = blocks_of(block_tokens, tokens), block_tokens
        self.tokens = tokens
        sizes = {
            "B": num_blocks(len(self.blocks)),
            "H": heads.count,
            "N": block_tokens,
            "D": HEAD_SIZE,
        }
        self.order, self.heads, self.layers = order, heads, list(layers)
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
        expected = len(self.layers) * 2 * self.heads.count * self.tokens * HEAD_SIZE
        return not wrong and np.count_nonzero(self.tensors) == expected

    def _parts(self) -> list[tuple[Elements, Elements]]:
        """Of each block: what it has of the tokens, and what it must have, as [head, token, D]."""
        kv, parts = model_kv(self.tokens), []
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
    tokens: int = TOKENS,
) -> None:
    """In the peer's process, under its key."""
    key = BlocksCacheKey(node.datadist.cluster_id)
    shard = Shard(node, order, block_tokens, heads, layers, key, readers, tokens)
    if is_filled:
        shard.fill()
    _shards.append(shard)


def push(node: Node, key: BlocksCacheKey, blocks: list[int], tokens: int = TOKENS) -> None:
    """The last shard that was added, to a cache of a peer's."""
    shard = _shards[-1]
    node.manager.push_blocks(key, shard.cache, shard.blocks, blocks, tokens=tokens)


def has_it_all(_: Node) -> bool:
    """Of the last shard that was added."""
    return _shards[-1].has_it_all()


def unregister(node: Node) -> None:
    """The last shard that was added."""
    node.manager.unregister_cache(_shards.pop().cache.cache_id)


def is_read(node: Node, within_s: float = 0.0) -> bool:
    """Of the last shard that was added."""
    return node.manager.wait_for_readers(_shards[-1].cache, within_s)
