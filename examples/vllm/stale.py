"""What decode answers when the blocks that it was told of hold something else by then.

Never other tokens: the right ones, or an error. Prefill has few blocks, so that each prompt takes
those of prompts before, and decode keeps none, so that it reads each time.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from client import Answer, ask, greedy, prefill, right_tokens
from random_models import words
from rich.table import Table

from llm_datadist.cli.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from servers import Pair, Process

    Tokens = tuple[int, ...]

LEASE_S = 2
#: of 128 tokens
PREFILL_OPTIONS = ("--num-gpu-blocks-override", "24")
DECODE_OPTIONS = ("--no-enable-prefix-caching",)
_NUM_NEW_TOKENS = 16
_PROMPT_TOKENS = 600
#: when decode is stopped in the middle of its request
_MOMENTS_S = (0.01, 0.03, 0.1)


@dataclass(frozen=True, slots=True)
class Case:
    """One way for blocks to be stale."""

    name: str
    outcome: str
    error: str | None

    @property
    def is_good(self) -> bool:
        """Whether no wrong token was answered."""
        return self.outcome != "WRONG TOKENS"


@dataclass(frozen=True, slots=True)
class Stale:
    """All cases."""

    cases: list[Case]

    @property
    def is_good(self) -> bool:
        """Whether none was answered with wrong tokens."""
        return all(case.is_good for case in self.cases)

    @property
    def verdict(self) -> str:
        """For the closing line."""
        return f"stale {sum(case.is_good for case in self.cases)}/{len(self.cases)}"

    def figures(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def table(self) -> Table:
        """A row a case."""
        table = Table("blocks that", "answer", "error")
        for case in self.cases:
            table.add_row(case.name, case.outcome, case.error or "")
        return table


class Harness:
    """The cases, one after the other, each with prompts of its own."""

    def __init__(self, plain: Process, pair: Pair, report: Callable[[str], None]) -> None:
        self._plain, self._pair, self._report = plain, pair, report
        self._words = random.Random("stale")

    def run(self) -> Stale:
        """Raises CommandError when a server fails that should not."""
        cases = []
        for name, answer, expected in self._answers():
            case = Case(name, outcome(answer, expected), answer.error)
            self._report(f"blocks that {name}: {case.outcome}")
            cases.append(case)
        return Stale(cases)

    def _answers(self) -> Iterator[tuple[str, Answer, Tokens]]:
        request, expected = self._new_request()
        ready = self._prefilled(request)
        yield "are there", ask(self._pair.decode, ready), expected
        self._reuse_blocks()
        yield "were read before, and reused", ask(self._pair.decode, ready), expected

        request, expected = self._new_request()
        ready = self._prefilled(request)
        self._reuse_blocks()
        yield "were freed and reused before", ask(self._pair.decode, ready), expected

        for moment_s in _MOMENTS_S:
            request, expected = self._new_request()
            ready = self._prefilled(request)
            answer = self._asked_and_stopped(ready, moment_s)
            yield f"are reused after {moment_s * 1e3:.0f} ms of decode", answer, expected

        mine, expected = self._new_request()
        others, _ = self._new_request()
        ready, theirs = self._prefilled(mine), self._prefilled(others)
        params = dict(ready["kv_transfer_params"])
        params["remote_block_ids"] = theirs["kv_transfer_params"]["remote_block_ids"]
        forged = ready | {"kv_transfer_params": params}
        yield "a client took from another", ask(self._pair.decode, forged), expected

        request, expected = self._new_request()
        ready = self._prefilled(request)
        self._pair.prefill.kill()
        self._pair.prefill.start()
        self._pair.prefill.wait_until_ready()
        self._reuse_blocks()
        yield "were a prefill's that was restarted", ask(self._pair.decode, ready), expected
        request, expected = self._new_request()
        ready = self._prefilled(request)
        yield "are the restarted one's", ask(self._pair.decode, ready), expected

    def _new_request(self) -> tuple[dict[str, Any], Tokens]:
        """With what the plain server answers; see hybrid.py for the last token."""
        beginning = self._new_words()
        first, *others = right_tokens(self._plain, greedy(beginning, 1 + _NUM_NEW_TOKENS))
        return greedy([*beginning, first], _NUM_NEW_TOKENS), tuple(others)

    def _new_words(self) -> list[int]:
        return words(self._words, _PROMPT_TOKENS - 1)

    def _prefilled(self, request: dict[str, Any]) -> dict[str, Any]:
        return prefill(self._pair.prefill, request)

    def _reuse_blocks(self) -> None:
        """Let leases end, and fill all of prefill's blocks with other prompts."""
        until = time.monotonic() + 2 * LEASE_S
        count = 0
        while time.monotonic() < until or count < 6:
            answer = ask(self._pair.prefill, greedy(self._new_words(), 1))
            if answer.error is not None:
                raise CommandError(f"prefill answers {answer.error}: {self._pair.prefill.log}")
            count += 1

    def _asked_and_stopped(self, ready: dict[str, Any], moment_s: float) -> Answer:
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(ask, self._pair.decode, ready)
            time.sleep(moment_s)
            self._pair.decode.pause()
            try:
                self._reuse_blocks()
            finally:
                self._pair.decode.resume()
            return answer.result()


def outcome(answer: Answer, expected: Tokens) -> str:
    """What was answered, in words; an error may have had some of the right tokens before it."""
    if answer.error is not None:
        return "error" if expected[: len(answer.tokens)] == answer.tokens else "WRONG TOKENS"
    return "right" if answer.tokens == expected else "WRONG TOKENS"
