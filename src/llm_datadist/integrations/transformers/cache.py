"""PagedCache: a cache for `generate` whose keys and values lie in blocks of a pool."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from transformers.cache_utils import Cache, DynamicLayer

from llm_datadist.errors import LLMException, invalid
from llm_datadist.integrations.transformers.blocks import BlockTable

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from typing_extensions import Self

    from llm_datadist.integrations.transformers.blocks import BlockStore
    from llm_datadist.integrations.transformers.shape import KVShape, Place


class PagedCache(Cache):  # type: ignore[misc]  # mypy does not follow transformers
    """The KV cache of one sequence, for `generate(..., **cache_argument(cache))`.

    Made by `KVPool.new_cache` and `KVPool.fetch`. It takes blocks of the pool as it grows, and
    keeps them until `release`, or the end of its `with`. Each step reads all of its tokens out of
    the blocks, as transformers' DynamicCache copies all of its own.

    One sequence: no batches, beams or several return sequences (LLMException, LLM_PARAM_INVALID).
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
    def blocks(self) -> list[int]:
        """The numbers of its blocks, in the order of its tokens; those in reserve come last."""
        return list(self._table.blocks)

    def reserve(self, num_tokens: int) -> None:
        """Takes the blocks for `num_tokens` tokens in all, so that none can be missing later.

        Raises OutOfBlocks, and takes none, when too few are free.
        """
        self._table.reserve(num_tokens)

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

    def note_length(self, num_tokens: int) -> None:
        """For KVPool: every layer has that many tokens in the blocks now."""
        for layer in self.layers:
            layer.num_tokens = num_tokens

    def note_published(self, end: Callable[[], None]) -> None:
        """For KVPool: its tokens stay as they are until `release`, which calls `end` first."""
        self._num_published = self.get_seq_length()
        self._releases.callback(end)

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
        """Writes the states of new tokens; all keys and values. [1, head, token, head_dim]"""
        self._check(key_states, self._shape.head_dim, "KV heads")
        self._check(value_states, self._shape.value_dim, "heads of values")
        begin = self.num_tokens
        self._table.reserve(begin + key_states.shape[-2])
        self.num_tokens += key_states.shape[-2]
        keys = self._append(self._shape.keys_at(self._index), begin, key_states)
        return keys, self._append(self._shape.values_at(self._index), begin, value_states)

    def get_seq_length(self) -> int:
        """How many tokens it has. Raises LLMException when the cache was released."""
        self._table.check_held()
        return self.num_tokens

    def reorder_cache(self, *_: object) -> None:
        """Refused: there is one sequence. Raises LLMException (LLM_PARAM_INVALID)."""
        raise _one_sequence()

    batch_repeat_interleave = batch_select_indices = reorder_cache

    def _append(self, place: Place, begin: int, states: torch.Tensor) -> torch.Tensor:
        self._table.write(place, begin, states[0].detach().transpose(0, 1))
        return self._table.read(place, self.num_tokens).transpose(0, 1).unsqueeze(0)

    def _check(self, states: torch.Tensor, pools_dim: int, what: str) -> None:
        batch, heads, _, dim = states.shape
        if batch != 1:
            raise _one_sequence()
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


def _one_sequence() -> LLMException:
    return invalid(
        "a PagedCache holds one sequence: no batches, beams or several return sequences; take a "
        "cache for each"
    )
