"""Whether models of every kind of KV cache answer by way of prefill and decode as they do alone.

Decode computes the last token of a prompt by itself, with other kernels than prefill has for many
tokens, and vLLM's for MLA on a CPU do not agree to the last bit. So each prompt ends with the token
that the plain server has answered first, which it has computed by itself, too. Where even the
number of tokens that are computed at once matters, prefill is asked without that one.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from client import Answer, ask, greedy, num_loaded_tokens, num_pulled_bytes, prefill, right_tokens
from random_models import words
from rich.table import Table

from llm_datadist.cli.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from servers import Pair, Process

NUM_NEW_TOKENS = 16
#: 255: the last token's window of 128 begins one token before a block of 128 does
PROMPT_TOKENS = (7, 127, 128, 129, 255, 300, 605)
#: behind the longest, whose first tokens decode then has
_NUM_MORE = 70


@dataclass(frozen=True, slots=True)
class Row:
    """One model, or one pair of shapes."""

    name: str
    groups: str
    num_prompts: int
    num_identical: int
    #: what decode had from prefill
    loaded_tokens: int
    prompt_tokens: int
    pulled_nbytes: int
    error: str | None

    @property
    def is_good(self) -> bool:
        """Whether all answers are right, and nearly all tokens came from prefill."""
        is_right = self.num_identical == self.num_prompts and self.error is None
        return is_right and self.loaded_tokens >= self.prompt_tokens - 2 * self.num_prompts


@dataclass(frozen=True, slots=True)
class Rows:
    """What was found for all of them."""

    part: str
    rows: list[Row]

    @property
    def is_good(self) -> bool:
        """Whether all did."""
        return all(row.is_good for row in self.rows)

    @property
    def verdict(self) -> str:
        """For the closing line."""
        return f"{self.part} {sum(row.is_good for row in self.rows)}/{len(self.rows)}"

    def figures(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def table(self) -> Table:
        """A row each."""
        table = Table("what", "KV cache groups")
        for heading in ("identical", "tokens loaded\nof computed", "KiB moved", "error"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(
                row.name,
                row.groups,
                f"{row.num_identical} of {row.num_prompts}",
                f"{row.loaded_tokens} of {row.prompt_tokens}",
                f"{row.pulled_nbytes / 1024:,.0f}",
                row.error or "",
            )
        return table


def prompts_of(name: str) -> list[list[int]]:
    """Random words, and once more words behind those of the longest. The same each time.

    Each without its last token.
    """
    source = random.Random(name)
    prompts = [words(source, num - 1) for num in PROMPT_TOKENS]
    return [*prompts, prompts[-1] + words(source, _NUM_MORE)]


def compare(
    name: str,
    groups: str,
    plain: Process,
    pair: Pair,
    report: Callable[[str], None],
    *,
    needs_same_batch: bool = False,
) -> Row:
    """Ask one and the other. Raises CommandError when the plain server fails."""
    prompts, expected = [], []
    for beginning in prompts_of(name):
        first, *others = right_tokens(plain, greedy(beginning, 1 + NUM_NEW_TOKENS))
        prompts.append([*beginning, first])
        expected.append(tuple(others))
    if len(set(expected)) < len(expected):
        raise CommandError(f"{name} gives one answer to several prompts: {expected}")
    report(f"{name}: {len(prompts)} prompts by way of prefill and decode")
    answers, loaded = [], 0
    for prompt in prompts:
        before = num_loaded_tokens(pair.decode)
        answers.append(_answer(pair, prompt, needs_same_batch=needs_same_batch))
        loaded += num_loaded_tokens(pair.decode) - before
    return Row(
        name,
        groups,
        len(prompts),
        sum(a.tokens == tokens for a, tokens in zip(answers, expected, strict=True)),
        loaded,
        _num_to_load(prompts),
        num_pulled_bytes(pair.decode),
        next((answer.error for answer in answers if answer.error), None),
    )


def _answer(pair: Pair, prompt: list[int], *, needs_same_batch: bool) -> Answer:
    request = greedy(prompt, NUM_NEW_TOKENS)
    if not needs_same_batch:
        return ask(pair.proxy, request)
    ready = prefill(pair.prefill, greedy(prompt[:-1], 1))
    return ask(pair.decode, request | {"kv_transfer_params": ready["kv_transfer_params"]})


def _num_to_load(prompts: Sequence[list[int]]) -> int:
    """All, but of the last prompt those that the one before begins with: decode may have them."""
    return sum(map(len, prompts[:-1])) + _NUM_MORE
