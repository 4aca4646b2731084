"""The parts of a run, each with the servers that it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from connector import POLICIES, Connector
from failures import Failures, provoke
from parity import check, plain_answers
from prompts import Prompts
from servers import plain_server, server_pair
from ttft import TimeToFirstToken

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parity import Parity
    from servers import Settings

    Tokens = tuple[int, ...]

#: of the prompts with shared beginnings: a middling one to warm up with, and two long pairs
_FOR_FAILURES = (3, 4, 8, 9, 13)


class Session:
    """One run. Plain answers are computed once."""

    def __init__(
        self, settings: Settings, connector: Connector, report: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._connector = connector
        self._report = report
        self._texts = Prompts(settings.model)
        self._prompts = self._texts.with_shared_beginnings()
        #: by the prompt's index
        self._expected: dict[int, Tokens] = {}

    def parity(self) -> Parity:
        """All prompts by way of prefill and decode."""
        expected = self._plain_answers(range(len(self._prompts)))
        self._report(f"prefill and decode start with {self._connector.vllm_name}")
        with server_pair(self._settings, self._connector, "fail") as pair:
            return check(pair, self._prompts, expected, self._report)

    def failures(self) -> Failures:
        """Prefill killed at each moment, under each policy."""
        answers = self._plain_answers(_FOR_FAILURES)
        prompts = [self._prompts[index] for index in _FOR_FAILURES]
        cases = []
        for policy in POLICIES:
            self._report(f"prefill and decode start, policy {policy}")
            with server_pair(self._settings, self._connector, policy) as pair:
                cases += provoke(pair, policy, prompts, answers, self._report)
        return Failures(cases)

    def ttft(self, num_rounds: int, num_samples: int) -> TimeToFirstToken:
        """Both connectors in turn, or NixlConnector alone where the run is about that.

        Only one pair of servers is up at a time: NIXL's progress threads keep a core each busy
        even when nothing is to do, which would be a burden on the other pair.
        """
        connectors = list(Connector)
        if self._connector is Connector.NIXL:
            connectors = [Connector.NIXL]
        result = TimeToFirstToken()
        for round_number in range(num_rounds):
            # A B B A: what drifts meanwhile meets both.
            for connector in connectors[:: -1 if round_number % 2 else 1]:
                self._report(
                    f"round {round_number + 1} of {num_rounds}: {connector.vllm_name} starts"
                )
                with server_pair(self._settings, connector, "fail") as pair:
                    result.measure(pair, connector, self._texts, num_samples, self._report)
                # A run may be ended early: what is measured by then can be read.
                self._report(f"{connector.vllm_name}: {result.medians(connector)}")
        return result

    def _plain_answers(self, indices: Sequence[int]) -> list[Tokens]:
        missing = [index for index in indices if index not in self._expected]
        if missing:
            self._report("a plain server starts")
            with plain_server(self._settings) as server:
                self._report(f"the plain server answers {len(missing)} prompts")
                answers = plain_answers(server, [self._prompts[index] for index in missing])
                self._expected.update(zip(missing, answers, strict=True))
        return [self._expected[index] for index in indices]
