"""KVShape: how the KV cache of a model lies in blocks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, NamedTuple

from llm_datadist.errors import invalid
from llm_datadist.integrations.transformers.kept import kept_by, kept_without_weights
from llm_datadist.types import DataType

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from llm_datadist.integrations.transformers.kept import Kept

_DATA_TYPES: Final = {
    "float32": DataType.DT_FLOAT,
    "float16": DataType.DT_FLOAT16,
    "bfloat16": DataType.DT_BF16,
}


class Place(NamedTuple):
    """Where the keys, or the values, of a layer lie: elements of each head's row in a tensor."""

    tensor: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class KVShape:
    """What the KV cache of a model looks like; equal on both ends of a hand-over, but for
    `block_tokens`.

    `dtype` is torch's name of the elements: float32, float16 or bfloat16. Raises LLMException
    (LLM_PARAM_INVALID) for another one, and for numbers below 1.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    #: tokens in a block
    block_tokens: int
    #: as `head_dim`, of values; 0 becomes `head_dim`
    value_dim: int = 0

    def __post_init__(self) -> None:
        if self.value_dim == 0:
            object.__setattr__(self, "value_dim", self.head_dim)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "dtype" and value < 1:
                raise invalid(f"{field.name} must be at least 1, got {value}")
        if self.dtype not in _DATA_TYPES:
            raise invalid(f"dtype must be one of {', '.join(_DATA_TYPES)}, got {self.dtype}")

    @classmethod
    def of(cls, model: PreTrainedModel, block_tokens: int = 16) -> KVShape:
        """The shape for a loaded model, which reads one token for it. Raises as `of_config`."""
        kept = kept_by(model)
        return cls._of(kept, kept.dtype, block_tokens)

    @classmethod
    def of_config(
        cls, config: PreTrainedConfig, dtype: torch.dtype, block_tokens: int = 16
    ) -> KVShape:
        """The shape for any decoder with attention in every layer, before its weights are loaded.

        Raises LLMException (LLM_PARAM_INVALID), which names the layer, for a model of another kind.
        """
        return cls._of(kept_without_weights(config), dtype, block_tokens)

    @classmethod
    def _of(cls, kept: Kept, dtype: torch.dtype, block_tokens: int) -> KVShape:
        return cls(
            num_layers=kept.num_layers,
            num_kv_heads=kept.num_heads,
            head_dim=kept.key_dim,
            dtype=str(dtype).removeprefix("torch."),
            block_tokens=block_tokens,
            value_dim=kept.value_dim,
        )

    @property
    def num_tensors(self) -> int:
        """K and V of each layer; they share one where they are of unequal sizes."""
        return self.num_layers * (1 if self._is_shared else 2)

    @property
    def block(self) -> tuple[int, int, int]:
        """The shape of one block of one tensor: tokens, heads, row. It is contiguous."""
        row = self.head_dim + (self.value_dim if self._is_shared else 0)
        return (self.block_tokens, self.num_kv_heads, row)

    @property
    def order(self) -> str:
        """What the dims of a tensor count, as `KVLayout.of` takes it."""
        return "BNHC" if self._is_shared else "BNHD"

    @property
    def _is_shared(self) -> bool:
        return self.head_dim != self.value_dim

    def keys_at(self, layer: int) -> Place:
        """Where the keys of that layer lie."""
        return Place(layer if self._is_shared else 2 * layer, 0, self.head_dim)

    def values_at(self, layer: int) -> Place:
        """Where its values lie."""
        if self._is_shared:
            return Place(layer, self.head_dim, self.head_dim + self.value_dim)
        return Place(2 * layer + 1, 0, self.value_dim)

    @property
    def block_nbytes(self) -> int:
        """What one block takes, over all tensors."""
        tokens, heads, dim = self.block
        return self.num_tensors * tokens * heads * dim * self.data_type.itemsize

    @property
    def data_type(self) -> DataType:
        """The type of the elements, for a CacheDesc."""
        return _DATA_TYPES[self.dtype]

    def num_blocks(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens need."""
        return -(-num_tokens // self.block_tokens)

    def check_prefill(self, prefill: KVShape) -> None:
        """Raises LLMException (LLM_PARAM_INVALID), naming the fields in which `prefill` differs."""
        differences = [
            f"{field.name} is {theirs} at prefill, {ours} here"
            for field in fields(self)
            if field.name != "block_tokens"
            and (theirs := getattr(prefill, field.name)) != (ours := getattr(self, field.name))
        ]
        if differences:
            raise invalid(
                f"the KV cache does not fit this pool: {'; '.join(differences)}. Both ends need "
                "the same model, in the same dtype"
            )
