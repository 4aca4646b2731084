"""KVShape: how the KV cache of a model lies in blocks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from llm_datadist.errors import invalid
from llm_datadist.types import DataType

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_DATA_TYPES: Final = {
    "float32": DataType.DT_FLOAT,
    "float16": DataType.DT_FLOAT16,
    "bfloat16": DataType.DT_BF16,
}
#: what a layer's whole past can be kept for; a sliding window is a matter of the mask alone
_LAYER_TYPES: Final = {"full_attention", "sliding_attention"}


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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "dtype" and value < 1:
                raise invalid(f"{field.name} must be at least 1, got {value}")
        if self.dtype not in _DATA_TYPES:
            raise invalid(f"dtype must be one of {', '.join(_DATA_TYPES)}, got {self.dtype}")

    @classmethod
    def of(cls, model: PreTrainedModel, block_tokens: int = 16) -> KVShape:
        """The shape for a loaded model, with the type of its weights. Raises as `of_config`."""
        return cls.of_config(model.config, model.dtype, block_tokens)

    @classmethod
    def of_config(
        cls, config: PreTrainedConfig, dtype: torch.dtype, block_tokens: int = 16
    ) -> KVShape:
        """The shape for any decoder with attention in every layer, before its weights are loaded.

        Raises LLMException (LLM_PARAM_INVALID) for a model of another kind.
        """
        decoder = config.get_text_config(decoder=True)
        others = set(getattr(decoder, "layer_types", None) or ()) - _LAYER_TYPES
        heads = getattr(decoder, "num_attention_heads", None)
        if config.is_encoder_decoder or others or heads is None:
            kinds = f" with layers of type {', '.join(sorted(others))}" if others else ""
            raise invalid(
                f"{type(config).__name__}{kinds} is not supported: only decoders that keep keys "
                "and values of all tokens in every layer are"
            )
        return cls(
            num_layers=decoder.num_hidden_layers,
            num_kv_heads=getattr(decoder, "num_key_value_heads", None) or heads,
            head_dim=getattr(decoder, "head_dim", None) or decoder.hidden_size // heads,
            dtype=str(dtype).removeprefix("torch."),
            block_tokens=block_tokens,
        )

    @property
    def num_tensors(self) -> int:
        """K and V of each layer."""
        return 2 * self.num_layers

    @property
    def block(self) -> tuple[int, int, int]:
        """The shape of one block of one tensor: tokens, heads, head_dim. It is contiguous."""
        return (self.block_tokens, self.num_kv_heads, self.head_dim)

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
