"""KV cache groups: layers that share block numbers, and which of a request's blocks matter.

vLLM's hybrid allocator gives each group a list of blocks of its own, in the order of the tokens.
What no later token looks at has no block any more: all before a window, all states but the last.
So a hand-over names, by group, the blocks that who goes on needs; the last has the last token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

#: of vLLM's block pool: nobody's, in place of blocks that there are none of
NULL_BLOCK = 0

#: of which tokens a group keeps blocks: of all; of a sliding window; of the chunk that the next
#: token is in; or there is one state of all of them (Mamba)
Kept: TypeAlias = Literal["all", "window", "chunk", "state"]


@dataclass(frozen=True)
class Group:
    """Layers with one list of blocks a request."""

    layers: tuple[str, ...]
    block_tokens: int
    kept: Kept = "all"
    #: of a window or chunk
    span_tokens: int = 0

    @property
    def keeps_all(self) -> bool:
        """Whether blocks that were computed stay as they are until the request ends."""
        return self.kept == "all"

    def num_blocks(self, num_tokens: int) -> int:
        """How long the list is, with those that are kept no more."""
        return -(-num_tokens // self.block_tokens)

    def first_block(self, num_tokens: int) -> int:
        """The place of the first block that is needed by who goes on behind so many tokens."""
        if self.kept == "state":
            return max(0, self.num_blocks(num_tokens) - 1)
        first_token = 0
        if self.kept == "window":
            first_token = max(0, num_tokens - self.span_tokens + 1)
        elif self.kept == "chunk":
            first_token = num_tokens - num_tokens % self.span_tokens
        return first_token // self.block_tokens

    def needed(self, block_ids: Sequence[int], num_tokens: int) -> list[int]:
        """Of a request's whole list, what a hand-over of so many tokens names.

        Raises LookupError if one of them is kept no more.
        """
        place = slice(self.first_block(num_tokens), self.num_blocks(num_tokens))
        blocks = list(block_ids[place])
        is_gone = not self.keeps_all and NULL_BLOCK in blocks  # else it is a block like others
        if len(blocks) != place.stop - place.start or is_gone:
            raise LookupError(f"the blocks of {self.layers[0]} are not all there")
        return blocks

    def pairs(
        self, handed: Sequence[int], ours: Sequence[int], num_tokens: int, num_computed: int
    ) -> tuple[list[int], list[int]]:
        """Which of the handed blocks goes to which of ours, where we have the first tokens already.

        `ours` is the request's whole list. Raises LookupError if either are not what is needed.
        """
        first, stop = self.first_block(num_tokens), self.num_blocks(num_tokens)
        if len(handed) != stop - first:
            raise LookupError(
                f"the hand-over has {len(handed)} blocks of {self.layers[0]}, not {stop - first}"
            )
        begin = first if self.kept == "state" else max(first, num_computed // self.block_tokens)
        own = self.needed(ours, num_tokens)
        return list(handed[begin - first :]), own[begin - first :]

    def token_pairs(
        self,
        their_block_tokens: int,
        handed: Sequence[int],
        ours: Sequence[int],
        num_tokens: int,
        num_computed: int,
    ) -> tuple[list[int], list[int], range]:
        """The same where their blocks have another size, with the tokens that lie in both lists.

        Of a window theirs must be a multiple of ours: else of our first block they may have freed
        the beginning, and vLLM would take all of it for whole.
        """
        theirs = replace(self, block_tokens=their_block_tokens)
        their_first, their_stop = theirs.first_block(num_tokens), theirs.num_blocks(num_tokens)
        if len(handed) != their_stop - their_first:
            raise LookupError(
                f"the hand-over has {len(handed)} blocks of {self.layers[0]}, not "
                f"{their_stop - their_first}"
            )
        first = self.first_block(num_tokens)
        begin = max(first, num_computed // self.block_tokens)
        tokens = range(begin * self.block_tokens, num_tokens)
        src = handed[tokens.start // their_block_tokens - their_first :]
        return list(src), self.needed(ours, num_tokens)[begin - first :], tokens
