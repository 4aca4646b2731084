"""Prompts as tokens: groups that share a long beginning, and texts that nobody has seen before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from llm_datadist.cli.demo.request import PROMPTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: the lengths of the beginnings that prompts share: within a block of 128, and over several
_SHARED_TOKENS = (0, 100, 300, 700, 1400)
_TAILS = (
    "The capital of France is",
    "Which day was the windiest, and why does the log not say so?",
    "Write a short poem about the keeper, the lamp and the storm petrel on the lantern room.",
    "What did the supply boat bring? Answer with a list, and add what was missing from it: "
    "oil for the lamp, flour for the bread, paper for the log, or letters from the harbour.",
)


class Prompts:
    """Texts about a lighthouse, cut to a number of tokens."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._log = self._encode(PROMPTS[-1].text)

    def with_shared_beginnings(self) -> list[list[int]]:
        """20 prompts, 5 to about 1,450 tokens, in 5 groups; neighbours share nothing."""
        return [
            self._beginning(group)[:num_tokens] + self._encode(tail)
            for tail in _TAILS
            for group, num_tokens in enumerate(_SHARED_TOKENS)
        ]

    def unique(self, number: int, num_tokens: int) -> list[int]:
        """A prompt of exactly `num_tokens`, unlike all of another number from its first token on.

        No prefix cache has seen it.
        """
        start = self._encode(f"{number} is the number of this lighthouse. ")
        return self._filled(start, num_tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """What `tokens` say."""
        return str(self._tokenizer.decode(list(tokens)))

    def _beginning(self, group: int) -> list[int]:
        start = self._encode(f"Lighthouse {group}. ")
        return self._filled(start, max(_SHARED_TOKENS))

    def _filled(self, start: list[int], num_tokens: int) -> list[int]:
        text = list(start)
        while len(text) < num_tokens:
            text += self._log
        return text[:num_tokens]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)
