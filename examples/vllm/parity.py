"""Whether answers by way of prefill and decode are, token by token, those of one server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from client import ask, greedy, num_loaded_tokens, right_tokens
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from servers import Pair, Process

    Tokens = tuple[int, ...]

NUM_NEW_TOKENS = 24
_NUM_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, asked alone and later again beside three others."""

    prompt_tokens: int
    #: how many of them decode had from prefill when the prompt was asked alone; the rest it knew
    #: from a prompt before
    loaded_tokens: int
    is_identical_alone: bool
    is_identical_among_others: bool
    error: str | None

    @property
    def is_proven(self) -> bool:
        """Whether both answers are right, and prefill had a part in it."""
        return self.is_identical_alone and self.is_identical_among_others and self.loaded_tokens > 0


@dataclass(frozen=True, slots=True)
class Parity:
    """What was found for all prompts."""

    rows: list[Row]
    #: what decode had from prefill when the prompts were asked again
    again_loaded_tokens: int

    @property
    def num_proven(self) -> int:
        """How many prompts are answered as they should."""
        return sum(row.is_proven for row in self.rows)

    @property
    def is_good(self) -> bool:
        """Whether all are."""
        return self.num_proven == len(self.rows)

    @property
    def verdict(self) -> str:
        """For the closing line."""
        return f"parity {self.num_proven}/{len(self.rows)}"

    def figures(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"num_proven": self.num_proven}

    def table(self) -> Table:
        """A row a prompt."""
        table = Table(padding=(0, 1))
        for heading in ("prompt\ntokens", "loaded", "identical\nalone", "4 at once", "error"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(
                str(row.prompt_tokens),
                str(row.loaded_tokens),
                "yes" if row.is_identical_alone else "NO",
                "yes" if row.is_identical_among_others else "NO",
                row.error or "",
            )
        return table


def plain_answers(server: Process, prompts: Sequence[list[int]]) -> list[Tokens]:
    """What the answers should be. Raises CommandError when `server` fails."""
    return [right_tokens(server, greedy(prompt, NUM_NEW_TOKENS)) for prompt in prompts]


def check(
    pair: Pair,
    prompts: Sequence[list[int]],
    expected: Sequence[Tokens],
    report: Callable[[str], None],
) -> Parity:
    """Ask all `prompts` one by one, and then all again, four at once."""
    alone = []
    for index, prompt in enumerate(prompts):
        report(f"prompt {index + 1} of {len(prompts)}, {len(prompt)} tokens")
        before = num_loaded_tokens(pair.decode)
        answer = ask(pair.proxy, greedy(prompt, NUM_NEW_TOKENS))
        alone.append((answer, num_loaded_tokens(pair.decode) - before))

    report(f"all again, {_NUM_AT_ONCE} at once")
    before = num_loaded_tokens(pair.decode)
    with ThreadPoolExecutor(_NUM_AT_ONCE) as threads:
        again = list(
            threads.map(lambda prompt: ask(pair.proxy, greedy(prompt, NUM_NEW_TOKENS)), prompts)
        )
    return Parity(
        [
            Row(
                len(prompt),
                loaded,
                answer.tokens == tokens,
                other.tokens == tokens,
                answer.error or other.error,
            )
            for prompt, tokens, (answer, loaded), other in zip(
                prompts, expected, alone, again, strict=True
            )
        ],
        num_loaded_tokens(pair.decode) - before,
    )
