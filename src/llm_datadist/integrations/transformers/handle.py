"""KVHandle: what travels from prefill to decode."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from llm_datadist.errors import invalid
from llm_datadist.integrations.transformers.shape import KVShape  # noqa: TC001  (msgspec reads it)


@dataclass(frozen=True, slots=True)
class KVHandle:
    """Where a published KV cache lies. A plain value, which travels by a channel of yours.

    It holds nothing: prefill keeps the blocks until it releases them, and a handle that comes later
    is refused (`KVPool.fetch`). Raises LLMException (LLM_PARAM_INVALID) for contents that cannot
    be.
    """

    #: who to pull from
    cluster_id: int
    #: the `model_id` of the BlocksCacheKey under which it was published; of no other meaning
    key: int
    #: of each sequence
    num_tokens: int
    #: the block numbers at prefill, in the order of the tokens, one sequence behind the other
    blocks: tuple[int, ...]
    shape: KVShape
    num_sequences: int = 1

    def __post_init__(self) -> None:
        needed = self.num_sequences * self.shape.num_blocks(self.num_tokens)
        if self.num_tokens < 1 or self.num_sequences < 1 or len(self.blocks) != needed:
            raise invalid(
                f"a handle of {self.num_sequences} times {self.num_tokens} tokens in "
                f"{len(self.blocks)} blocks of {self.shape.block_tokens} tokens cannot be"
            )

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """The blocks of each sequence."""
        width = len(self.blocks) // self.num_sequences
        return [self.blocks[i : i + width] for i in range(0, len(self.blocks), width)]

    def to_json(self) -> str:
        """The handle as one line of text."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> KVHandle:
        """The handle that `to_json` wrote. Raises LLMException (LLM_PARAM_INVALID) for another."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise invalid(f"this is no KVHandle: {error}") from error
