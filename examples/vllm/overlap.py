"""Prompts that decode reads while prefill computes them: the right tokens, or an error.

Prefill computes few tokens a step, so that a prompt takes many, and the proxy asks both at once.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from client import ask, greedy, num_running_requests
from random_models import words
from rich.table import Table
from stale import Case, outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from hybrid import Row
    from servers import Pair, Process

OVERLAP_OPTIONS = ("--max-num-batched-tokens", "64", "--max-num-seqs", "8")
EXTRA = {"overlap": True}
PROXY_OPTIONS = ("--overlap",)
_PROMPT_TOKENS = 1900
_NUM_NEW_TOKENS = 16
#: when prefill is killed, since it computes
_MOMENTS_S = (0.0, 0.1, 0.3)


@dataclass(frozen=True, slots=True)
class Overlap:
    """What prompts were answered, and what those that prefill died of."""

    row: Row
    cases: list[Case]

    @property
    def is_good(self) -> bool:
        """Whether all prompts were answered as they should, and no death with wrong tokens."""
        return self.row.is_good and all(case.is_good for case in self.cases)

    @property
    def verdict(self) -> str:
        """For the closing line."""
        num_good = self.row.is_good + sum(case.is_good for case in self.cases)
        return f"overlap {num_good}/{1 + len(self.cases)}"

    def figures(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def table(self) -> Table:
        """The prompts, and a row a death."""
        table = Table("what", "answers", "tokens loaded\nof computed", "error")
        row = self.row
        table.add_row(
            row.name,
            f"{row.num_identical} of {row.num_prompts} right",
            f"{row.loaded_tokens} of {row.prompt_tokens}",
            row.error or "",
        )
        for case in self.cases:
            table.add_row(case.name, case.outcome, "", case.error or "")
        return table


def kill(plain: Process, pair: Pair, report: Callable[[str], None]) -> list[Case]:
    """Kills prefill while it computes, at each moment. Raises httpx.HTTPError."""
    source = random.Random("overlap")
    cases = []
    for moment_s in _MOMENTS_S:
        ask(pair.proxy, greedy([1, 2, 3], 1))  # so that the proxy knows it
        prompt = words(source, _PROMPT_TOKENS)
        request = greedy(prompt, _NUM_NEW_TOKENS)
        expected = ask(plain, request).tokens
        name = f"prefill killed after {moment_s * 1e3:.0f} ms"
        report(name)
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(ask, pair.proxy, request)
            while not num_running_requests(pair.prefill) and not answer.done():
                pass
            time.sleep(moment_s)
            pair.prefill.kill()
            cases.append(Case(name, outcome(answer.result(), expected), answer.result().error))
        pair.prefill.start()
        pair.prefill.wait_until_ready()
    return cases
