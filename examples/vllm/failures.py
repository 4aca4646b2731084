"""What decode answers when prefill is killed: the right tokens or an error, never other tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING

import httpx
from client import Answer, ask, greedy, num_loaded_tokens, prefill
from parity import NUM_NEW_TOKENS
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from servers import Pair

    Tokens = tuple[int, ...]


class Moment(str, Enum):
    """When prefill is killed."""

    BEFORE = "before decode is asked"
    DURING = "while decode loads"


@dataclass(frozen=True, slots=True)
class Case:
    """One death of prefill."""

    policy: str
    moment: Moment
    #: what decode answered: `identical`, `error`, or what is wrong
    outcome: str
    #: whether a prefill that was started again at the same ports is as good as the first
    works_after_restart: bool
    error: str | None

    @property
    def is_good(self) -> bool:
        """Whether this may happen under this policy."""
        # A pull may well be over before its owner is dead.
        allowed = {"identical"} if self.policy == "recompute" else {"identical", "error"}
        if self.policy == "fail" and self.moment is Moment.BEFORE:
            allowed = {"error"}
        return self.outcome in allowed and self.works_after_restart


@dataclass(frozen=True, slots=True)
class Failures:
    """All cases."""

    cases: list[Case]

    @property
    def num_good(self) -> int:
        """How many went as they may."""
        return sum(case.is_good for case in self.cases)

    @property
    def is_good(self) -> bool:
        """Whether all did."""
        return self.num_good == len(self.cases)

    @property
    def verdict(self) -> str:
        """For the closing line."""
        return f"failures {self.num_good}/{len(self.cases)}"

    def figures(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"num_good": self.num_good}

    def table(self) -> Table:
        """A row a case."""
        table = Table("policy", "prefill is killed", "answer", "after a restart", "error")
        for case in self.cases:
            table.add_row(
                case.policy,
                case.moment.value,
                case.outcome,
                "works" if case.works_after_restart else "DOES NOT WORK",
                case.error or "",
            )
        return table


def provoke(
    pair: Pair,
    policy: str,
    prompts: Sequence[list[int]],
    expected: Sequence[Tokens],
    report: Callable[[str], None],
) -> list[Case]:
    """Kill prefill at each moment; `prompts` are a short one to warm up with, and long ones."""
    requests = [greedy(prompt, NUM_NEW_TOKENS) for prompt in prompts]
    warm, *rest = zip(requests, expected, strict=True)
    cases = []
    for index, moment in enumerate(Moment):
        ask(pair.proxy, warm[0])  # so that there is a link that can break
        request, tokens = rest[2 * index]
        report(f"policy {policy}: prefill is killed {moment.value}")
        answer = _answer_without_prefill(pair, request, moment)
        report(f"policy {policy}: prefill starts again")
        pair.prefill.start()
        pair.prefill.wait_until_ready()
        again, again_tokens = rest[2 * index + 1]
        before = num_loaded_tokens(pair.decode)
        later = ask(pair.proxy, again)
        works = later.tokens == again_tokens and num_loaded_tokens(pair.decode) > before
        error = answer.error or (None if works else later.error or "nothing was loaded, or wrong")
        cases.append(Case(policy, moment, _outcome(answer, tokens), works, error))
    return cases


def _answer_without_prefill(pair: Pair, request: dict[str, object], moment: Moment) -> Answer:
    try:
        decode_request = prefill(pair.prefill, request)
    except httpx.HTTPError as error:
        return Answer((), f"prefill: {error!r}")
    if moment is Moment.BEFORE:
        pair.prefill.kill()
        return ask(pair.decode, decode_request)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(ask, pair.decode, decode_request)
        pair.prefill.kill()
        return answer.result()


def _outcome(answer: Answer, expected: Tokens) -> str:
    if answer.error is not None:
        return "error" if expected[: len(answer.tokens)] == answer.tokens else "WRONG TOKENS"
    return "identical" if answer.tokens == expected else "WRONG TOKENS"
