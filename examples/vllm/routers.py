"""What stands in front of several servers: `vllm-router`, or the proxy of a fleet.

The router knows nothing of who moves the KV cache: it asks a prefill for one token, and hands on
what that says. A prefill that is killed meanwhile costs answers, and none is wrong. The proxy of a
fleet begins anew what a dead engine had. One that was started again at its place is asked as
before.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from client import ask, greedy, num_computed_tokens, num_loaded_tokens, right_tokens
from random_models import words
from rich.table import Table
from stale import outcome

from llm_datadist.cli.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable

    from servers import Group, Process

    Tokens = tuple[int, ...]

#: how many prefills, and how many decodes
TOPOLOGIES = ((1, 1), (2, 2))
_NUM_NEW_TOKENS = 16
_PROMPT_TOKENS = (40, 129, 300, 605)
#: of each length, so that every prefill meets every decode
_NUM_EACH = 4
#: the router takes a worker that failed a few times for dead, and looks again after a while
_MOST_ATTEMPTS = 30


@dataclass(frozen=True, slots=True)
class Row:
    """Prompts that went by way of a router at one time."""

    topology: str
    when: str
    num_prompts: int
    num_right: int
    num_errors: int
    #: what decodes had from prefills, of all tokens
    loaded_tokens: int
    prompt_tokens: int
    #: prefills and decodes that had a part in it
    num_used: tuple[int, int]
    #: whether errors may be: one of the prefills was killed
    may_fail: bool
    error: str | None

    @property
    def is_good(self) -> bool:
        """Whether no answer was wrong, and none failed that may not."""
        is_told = self.num_right + self.num_errors == self.num_prompts
        return is_told and (self.may_fail or not self.num_errors)


@dataclass(frozen=True, slots=True)
class Routers:
    """All of it."""

    part: str
    rows: list[Row]

    @property
    def is_good(self) -> bool:
        """Whether all rows are."""
        return all(row.is_good for row in self.rows)

    @property
    def verdict(self) -> str:
        """For the closing line."""
        return f"{self.part} {sum(row.is_good for row in self.rows)}/{len(self.rows)}"

    def figures(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def table(self) -> Table:
        """A row a time."""
        table = Table("prefills,\ndecodes", "when")
        for heading in ("right", "errors", "tokens loaded\nof all", "used", "error"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(
                row.topology,
                row.when,
                f"{row.num_right} of {row.num_prompts}",
                str(row.num_errors),
                f"{row.loaded_tokens} of {row.prompt_tokens}",
                "{}, {}".format(*row.num_used),
                (row.error or "")[:60],
            )
        return table


def route(
    plain: Process, group: Group, report: Callable[[str], None], *, may_fail: bool = True
) -> list[Row]:
    """Prompts through what is in front; then one prefill of several is killed, and started again.

    `may_fail`: a request that the dead one had may be answered with an error. Raises CommandError
    when the plain server fails, or the router never takes a prefill back.
    """
    rows = [_round(plain, group, "all are there", report)]
    if len(group.prefills) == 1:
        return rows
    victim = group.prefills[-1]
    rows.append(_round(plain, group, "one prefill is killed meanwhile", report, victim, may_fail))
    victim.start()
    victim.wait_until_ready()
    _until_taken_back(group, victim)
    rows.append(_round(plain, group, "it was started again", report))
    return rows


def _round(
    plain: Process,
    group: Group,
    when: str,
    report: Callable[[str], None],
    victim: Process | None = None,
    may_fail: bool = False,
) -> Row:
    topology = f"{len(group.prefills)}, {len(group.decodes)}"
    report(f"{topology}: {when}")
    prompts = _prompts(f"{topology} {when}")
    expected = [right_tokens(plain, greedy(prompt, _NUM_NEW_TOKENS)) for prompt in prompts]
    survivors = [each for each in group.prefills if each is not victim]
    computed = [num_computed_tokens(each) for each in survivors]
    loaded = [num_loaded_tokens(each) for each in group.decodes]
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(ask, group.front, greedy(p, _NUM_NEW_TOKENS)) for p in prompts]
        if victim is not None:
            asked[len(asked) // 3].result()
            victim.kill()
        answers = [each.result() for each in asked]
    outcomes = [outcome(*each) for each in zip(answers, expected, strict=True)]
    by_prefill = [
        num_computed_tokens(each) - before for each, before in zip(survivors, computed, strict=True)
    ]
    by_decode = [
        num_loaded_tokens(each) - before for each, before in zip(group.decodes, loaded, strict=True)
    ]
    return Row(
        topology,
        when,
        len(prompts),
        outcomes.count("right"),
        outcomes.count("error"),
        sum(by_decode),
        sum(map(len, prompts)),
        (sum(map(bool, by_prefill)), sum(map(bool, by_decode))),
        may_fail,
        next((answer.error for answer in answers if answer.error), None),
    )


def _prompts(name: str) -> list[list[int]]:
    """Random words, of which no two prompts share a beginning."""
    source = random.Random(name)
    return [words(source, num) for _ in range(_NUM_EACH) for num in _PROMPT_TOKENS]


def _until_taken_back(group: Group, prefill: Process) -> None:
    """Asks until the router has sent that prefill something."""
    source = random.Random("taken back")
    before = num_computed_tokens(prefill)
    for _ in range(_MOST_ATTEMPTS):
        ask(group.front, greedy(words(source, 200), 16))
        if num_computed_tokens(prefill) > before:
            return
    raise CommandError(f"{prefill.name} was started again, and the router never asks it")
