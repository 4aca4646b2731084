"""A conversation of several turns, in which prefill has of decode what decode has answered.

Neither keeps a prefix cache, so that what prefill does not compute it can only have had from there.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import httpx
from client import greedy, num_computed_tokens, right_tokens
from proxy import prefill_request
from random_models import words
from rich.table import Table

from llm_datadist.cli.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable

    from servers import Pair, Process

CHAT_OPTIONS = ("--no-enable-prefix-caching",)
_TURNS = 5
_FIRST_TOKENS, _MORE_TOKENS, _ANSWER_TOKENS = 300, 40, 24
_TIMEOUT_S = 240.0
#: of both requests: what comes is read, what is answered is handed on
_BOTH = {"do_remote_prefill": True, "do_remote_decode": True}


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer."""

    prompt_tokens: int
    #: that neither the turn before nor its answer had; the last token of an answer is among them
    new_tokens: int
    computed_tokens: int
    is_identical: bool

    @property
    def is_good(self) -> bool:
        """Whether the answer is right, and prefill computed only what was new."""
        return self.is_identical and self.computed_tokens <= self.new_tokens


@dataclass(frozen=True, slots=True)
class Chat:
    """All turns."""

    turns: list[Turn]

    @property
    def is_good(self) -> bool:
        """Whether all are."""
        return all(turn.is_good for turn in self.turns)

    @property
    def verdict(self) -> str:
        """For the closing line."""
        return f"chat {sum(turn.is_good for turn in self.turns)}/{len(self.turns)}"

    def figures(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def table(self) -> Table:
        """A row a turn."""
        table = Table("turn")
        for heading in ("prompt\ntokens", "new", "computed\nby prefill", "identical"):
            table.add_column(heading, justify="right")
        for number, turn in enumerate(self.turns, 1):
            figures = turn.prompt_tokens, turn.new_tokens, turn.computed_tokens
            table.add_row(str(number), *map(str, figures), "yes" if turn.is_identical else "NO")
        return table


def talk(plain: Process, pair: Pair, report: Callable[[str], None]) -> Chat:
    """Asks one and the other. Raises CommandError when a server fails, httpx.HTTPError."""
    source = random.Random("chat")
    prompt = words(source, _FIRST_TOKENS)
    known, back, turns = 0, dict[str, Any](), list[Turn]()
    for number in range(_TURNS):
        report(f"turn {number + 1}: {len(prompt)} tokens")
        request = greedy(prompt, _ANSWER_TOKENS)
        expected = right_tokens(plain, request)
        before = num_computed_tokens(pair.prefill)
        there = _asked(pair.prefill, prefill_request(request, **back))
        computed = num_computed_tokens(pair.prefill) - before
        here = _asked(pair.decode, request | {"kv_transfer_params": _params(there) | _BOTH})
        tokens = tuple(here["choices"][0]["token_ids"])
        turns.append(Turn(len(prompt), len(prompt) - known, computed, tokens == expected))
        back = _params(here) | _BOTH
        known = len(prompt) + _ANSWER_TOKENS - 1
        prompt = [*prompt, *expected, *words(source, _MORE_TOKENS)]
    return Chat(turns)


def _asked(server: Process, request: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(server.completions_url, json=request, timeout=_TIMEOUT_S)
    answer: dict[str, Any] = response.raise_for_status().json()
    return answer


def _params(answer: dict[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] | None = answer["kv_transfer_params"]
    if params is None:
        raise CommandError("an answer was not handed over: see the logs")
    return params
