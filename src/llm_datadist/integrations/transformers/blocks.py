"""The pool's memory, cut into blocks, and who has which of them."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

import torch

from llm_datadist.errors import LLMException, LLMStatusCode, invalid

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
        self._lock = threading.RLock()  # a finalizer that gives blocks back may strike under it

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

    def copy(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Block by block; a block may be in both."""
        read, written = torch.tensor(src), torch.tensor(dst)
        for tensor in self.memory:  # one after the other: what is read is a copy
            tensor[written] = tensor[read]

    def give_back(self, blocks: Sequence[int]) -> None:
        """Erases blocks, and lets others take them."""
        for block in blocks:
            self.memory[:, block] = torch.nan
        with self._lock:
            self._free.extend(blocks)


class BlockTable:
    """The blocks of one cache, until it is released: of each sequence, in the order of its tokens.

    All sequences have as many.
    """

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._is_released = False
        #: whether there is anything in the blocks
        self._is_filled = False
        self._set([[]])

    @property
    def sequences(self) -> list[list[int]]:
        """The blocks of each. Raises as `check_held`."""
        self.check_held()
        return self._sequences

    def check_held(self) -> None:
        """Raises LLMException (LLM_KV_CACHE_NOT_EXIST) after `release`."""
        if self._is_released:
            raise LLMException(
                "this PagedCache was released: its blocks may hold another request by now; make "
                "a new one (KVPool.new_cache)",
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )

    def reserve(self, num_tokens: int, num_sequences: int | None = None) -> None:
        """Takes the blocks that `num_tokens` tokens of each sequence need beyond those there are.

        While nothing is in the blocks there can be any number of sequences. Raises OutOfBlocks when
        too few are free, LLMException (LLM_PARAM_INVALID) for another number of sequences than
        those that are; all is as it was then.
        """
        before = len(self.sequences)
        self._hold(num_sequences or before)
        missing = self._store.shape.num_blocks(num_tokens) - len(self._sequences[0])
        if missing <= 0:
            return
        try:
            more = self._store.take(missing * len(self._sequences))
        except OutOfBlocks:
            self._hold(before)
            raise
        parts = (more[i : i + missing] for i in range(0, len(more), missing))
        self._set([each + part for each, part in zip(self._sequences, parts, strict=True)])

    def rearrange(self, sources: Sequence[int]) -> None:
        """Sequence `i` becomes what sequence `sources[i]` was.

        Raises OutOfBlocks, and changes nothing, when too few are free.
        """
        had = [block for each in self.sequences for block in each]
        src = [block for source in sources for block in self._sequences[source]]
        more = self._store.take(max(0, len(src) - len(had)))
        dst = [*had, *more][: len(src)]
        moved = [pair for pair in zip(src, dst, strict=True) if pair[0] != pair[1]]
        if moved:
            self._store.copy(*zip(*moved, strict=True))
        width = len(self._sequences[0])
        self._set([dst[i * width : (i + 1) * width] for i in range(len(sources))])
        self._store.give_back(had[len(src) :])

    def truncate(self, num_tokens: int) -> None:
        """Gives back the blocks behind the first `num_tokens` tokens of each sequence."""
        kept = self._store.shape.num_blocks(num_tokens)
        rest = [block for each in self.sequences for block in each[kept:]]
        self._is_filled &= num_tokens > 0
        self._set([each[:kept] for each in self._sequences])
        self._store.give_back(rest)

    def note_filled(self) -> None:
        """Somebody else has written to the blocks."""
        self._is_filled = True

    def release(self) -> None:
        """Gives all of them back, for good."""
        self.truncate(0)
        self._is_released = True

    def write(self, place: Place, begin: int, states: torch.Tensor) -> None:
        """Writes the states [sequence, token, head, head_dim] of the tokens from `begin` on."""
        self._is_filled = True
        slots = self._slots[:, begin : begin + states.shape[1]]
        memory = self._memory_at(place).flatten(0, 1)
        memory.index_copy_(0, slots.flatten(), states.flatten(0, 1))

    def read(self, place: Place, num_tokens: int) -> torch.Tensor:
        """A copy of the first tokens of each sequence: [sequence, token, head, head_dim]."""
        blocks = self._memory_at(place).index_select(0, self._index.flatten())
        return blocks.unflatten(0, self._index.shape).flatten(1, 2)[:, :num_tokens]

    def _hold(self, num_sequences: int) -> None:
        number = len(self._sequences)
        if num_sequences == number:
            return
        if self._is_filled:
            raise invalid(
                f"the PagedCache holds {number} sequences, and the model was given "
                f"{num_sequences}: where all go on from one, repeat it (batch_repeat_interleave); "
                "else take a new one (KVPool.new_cache)"
            )
        self.rearrange([0] * num_sequences)

    def _memory_at(self, place: Place) -> torch.Tensor:
        return self._store.memory[place.tensor, ..., place.begin : place.end]

    def _set(self, sequences: list[list[int]]) -> None:
        self._sequences = sequences
        block_tokens = self._store.shape.block_tokens
        self._index = torch.tensor(sequences, dtype=torch.long)
        #: where each token lies: its block's first slot, and its place in the block
        self._slots = (self._index[:, :, None] * block_tokens + torch.arange(block_tokens)).flatten(
            1
        )
