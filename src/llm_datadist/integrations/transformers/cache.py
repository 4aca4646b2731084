"""PagedCache: a cache for `generate` whose keys and values lie in blocks of a pool."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicLayer

from llm_datadist.errors import invalid
from llm_datadist.integrations.transformers.blocks import BlockTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from llm_datadist.integrations.transformers.blocks import BlockStore
    from llm_datadist.integrations.transformers.shape import KVShape, Place


class PagedCache(Cache):  # type: ignore[misc]  # mypy does not follow transformers
    """The KV cache of one sequence or a batch, for `generate(..., **cache_argument(cache))`.

    Made by `KVPool.new_cache` and `KVPool.fetch`. It takes blocks of the pool as it grows, and
    keeps them until `release`, or the end of its `with`. Each step reads all of its tokens out of
    the blocks, as transformers' DynamicCache copies all of its own.

    How many sequences it has, the first call of the model says: prompts, each times beams or
    return sequences. All are of one length, padding included. Each has blocks of its own, so where
    beams part, blocks are copied, as DynamicCache copies its tensors.

    For one thread at a time. After `release` every use is an LLMException
    (LLM_KV_CACHE_NOT_EXIST); what the blocks hold is gone.
    """

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        self._table = BlockTable(store)
        self._releases = ExitStack()
        self._releases.callback(self._table.release)
        #: what is published must not change
        self._num_published = 0
        layers = [_PagedLayer(self._table, store.shape, i) for i in range(store.shape.num_layers)]
        super().__init__(layers=layers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    @property
    def sequences(self) -> list[list[int]]:
        """The numbers of each sequence's blocks, in the order of its tokens; those in reserve come
        last.
        """
        return [list(blocks) for blocks in self._table.sequences]

    @property
    def blocks(self) -> list[int]:
        """The same, one sequence behind the other."""
        return [block for blocks in self._table.sequences for block in blocks]

    def reserve(self, num_tokens: int, num_sequences: int | None = None) -> None:
        """Takes the blocks for `num_tokens` tokens of each sequence, so that none can be missing
        later. An empty cache has one, unless `num_sequences` says otherwise.

        Raises OutOfBlocks, and takes none, when too few are free; LLMException (LLM_PARAM_INVALID)
        for another number of sequences than a cache has that is not empty.
        """
        self._table.reserve(num_tokens, num_sequences)

    def release(self) -> None:
        """Ends what was published of it, and gives its blocks back. May be called again."""
        self._releases.close()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes that many tokens (a negative number) from the end, and gives blocks back.

        A positive number is how many to keep, as in the first releases of transformers 5. Raises
        LLMException (LLM_PARAM_INVALID) when it would remove what was published.
        """
        length = self.get_seq_length()
        kept = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        if kept < length:
            self._keep(max(kept, 0))

    def reset(self) -> None:
        """Removes all tokens, and gives all blocks back; the cache can be used anew.

        Raises LLMException (LLM_PARAM_INVALID) when it was published.
        """
        self._keep(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence `i` goes on from what sequence `beam_idx[i]` has: the step of a beam search.

        As all that rearranges sequences, it raises OutOfBlocks, and changes nothing, when too few
        are free, and LLMException (LLM_PARAM_INVALID) when the cache was published.
        """
        self._rearrange(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times, one behind the other. Raises as `reorder_cache`.

        For beams, or several answers, that go on from what was fetched.
        """
        numbers = range(len(self._table.sequences))
        self._rearrange([number for number in numbers for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """These sequences alone, by number or by a mask. Raises as `reorder_cache`."""
        self._rearrange(torch.arange(len(self._table.sequences))[indices].tolist())

    def note_length(self, num_tokens: int) -> None:
        """For KVPool: every layer has that many tokens in the blocks now."""
        if num_tokens:
            self._table.note_filled()
        for layer in self.layers:
            layer.num_tokens = num_tokens

    def note_published(self, end: Callable[[], None]) -> None:
        """For KVPool: its tokens stay as they are until `release`, which calls `end` first."""
        self._num_published = self.get_seq_length()
        self._releases.callback(end)

    def _rearrange(self, sources: list[int]) -> None:
        if self._num_published:
            raise invalid(
                "this PagedCache is published, so its sequences stay as they are: release it first"
            )
        self._table.rearrange(sources)

    def _keep(self, num_tokens: int) -> None:
        if num_tokens < self._num_published:
            raise invalid(
                f"{self._num_published} tokens of this PagedCache are published, and only "
                f"{num_tokens} would be left: release it, and make a new one (KVPool.new_cache)"
            )
        self.note_length(num_tokens)
        self._table.truncate(num_tokens)


class _PagedLayer(DynamicLayer):  # type: ignore[misc]  # mypy does not follow transformers
    """K and V of one layer. What depends on its length alone is the DynamicLayer's."""

    def __init__(self, table: BlockTable, shape: KVShape, index: int) -> None:
        super().__init__()
        self._table = table
        self._shape = shape
        self._index = index
        self.num_tokens = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the states of new tokens; all keys and values.

        Of both, [sequence, head, token, head_dim].
        """
        self._check(key_states, self._shape.head_dim, "KV heads")
        self._check(value_states, self._shape.value_dim, "heads of values")
        begin = self.num_tokens
        self._table.reserve(begin + key_states.shape[-2], len(key_states))
        self.num_tokens += key_states.shape[-2]
        keys = self._append(self._shape.keys_at(self._index), begin, key_states)
        return keys, self._append(self._shape.values_at(self._index), begin, value_states)

    def get_seq_length(self) -> int:
        """How many tokens it has. Raises LLMException when the cache was released."""
        self._table.check_held()
        return self.num_tokens

    def _append(self, place: Place, begin: int, states: torch.Tensor) -> torch.Tensor:
        self._table.write(place, begin, states.detach().transpose(1, 2))
        return self._table.read(place, self.num_tokens).transpose(1, 2)

    def _check(self, states: torch.Tensor, pools_dim: int, what: str) -> None:
        _, heads, _, dim = states.shape
        dtype = str(states.dtype).removeprefix("torch.")
        shape = self._shape
        if (heads, dim, dtype) != (shape.num_kv_heads, pools_dim, shape.dtype):
            raise invalid(
                f"layer {self._index} of the model has {heads} {what} of {dim} {dtype}, and the "
                f"pool is for {shape.num_kv_heads} of {pools_dim} {shape.dtype}: it was made for "
                "another model, or by hand; KVShape.of(model) says what this one keeps"
            )
        if states.device.type != "cpu":
            raise invalid(f"the model runs on {states.device}: so far a pool is for the CPU alone")
