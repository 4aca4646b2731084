"""The pool's memory, cut into blocks, and who has which of them."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

import torch

from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.integrations.transformers.shape import KVShape, Place


class OutOfBlocks(LLMException):
    """A cache needs more blocks than are free (LLM_OUT_OF_MEMORY). It is as it was before."""


class BlockStore:
    """One tensor [K, V, K, V, ... by layer; block; token; head; head_dim], and a free list.

    Where values are of another size than keys, [K and V by layer; ...; head_dim + value_dim].

    Memory that belongs to nobody is NaN, so that using it cannot go unnoticed. Blocks are handed
    out in the order in which they were given back. Thread-safe.
    """

    def __init__(self, shape: KVShape, num_blocks: int) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.memory = torch.full(
            (shape.num_tensors, num_blocks, *shape.block),
            torch.nan,
            dtype=getattr(torch, shape.dtype),
        )
        self._free = deque(range(num_blocks))
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """How many blocks nobody has."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """The numbers of `count` blocks. Raises OutOfBlocks, and takes none, if fewer are free."""
        with self._lock:
            if count > len(self._free):
                raise OutOfBlocks(
                    f"{count} more blocks of {self.shape.block_tokens} tokens are needed, "
                    f"{len(self._free)} of the pool's {self.num_blocks} are free: release caches "
                    "that are done, or make the pool larger (num_blocks)",
                    LLMStatusCode.LLM_OUT_OF_MEMORY,
                )
            return [self._free.popleft() for _ in range(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        """Erases blocks, and lets others take them."""
        for block in blocks:
            self.memory[:, block] = torch.nan
        with self._lock:
            self._free.extend(blocks)


class BlockTable:
    """The blocks of one cache, in the order of its tokens, until it is released."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._is_released = False
        self._set([])

    @property
    def blocks(self) -> list[int]:
        """Raises as `check_held`."""
        self.check_held()
        return self._blocks

    def check_held(self) -> None:
        """Raises LLMException (LLM_KV_CACHE_NOT_EXIST) after `release`."""
        if self._is_released:
            raise LLMException(
                "this PagedCache was released: its blocks may hold another request by now; make "
                "a new one (KVPool.new_cache)",
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )

    def reserve(self, num_tokens: int) -> None:
        """Takes the blocks that `num_tokens` tokens need beyond those there are."""
        missing = self._store.shape.num_blocks(num_tokens) - len(self.blocks)
        if missing > 0:
            self._set(self.blocks + self._store.take(missing))

    def truncate(self, num_tokens: int) -> None:
        """Gives back the blocks behind the first `num_tokens` tokens."""
        kept = self._store.shape.num_blocks(num_tokens)
        rest = self.blocks[kept:]
        self._set(self.blocks[:kept])
        self._store.give_back(rest)

    def release(self) -> None:
        """Gives all of them back, for good."""
        self.truncate(0)
        self._is_released = True

    def write(self, place: Place, begin: int, states: torch.Tensor) -> None:
        """Writes the states [token, head, head_dim] of the tokens from `begin` on."""
        slots = self._slots[begin : begin + len(states)]
        self._memory_at(place).flatten(0, 1).index_copy_(0, slots, states)

    def read(self, place: Place, num_tokens: int) -> torch.Tensor:
        """A copy of the first `num_tokens` tokens: [token, head, head_dim]."""
        return self._memory_at(place).index_select(0, self._index).flatten(0, 1)[:num_tokens]

    def _memory_at(self, place: Place) -> torch.Tensor:
        return self._store.memory[place.tensor, ..., place.begin : place.end]

    def _set(self, blocks: list[int]) -> None:
        self._blocks = blocks
        block_tokens = self._store.shape.block_tokens
        self._index = torch.tensor(blocks, dtype=torch.long)
        #: where each token lies: its block's first slot, and its place in the block
        self._slots = (self._index[:, None] * block_tokens + torch.arange(block_tokens)).flatten()
