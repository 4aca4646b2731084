"""The parts of a run, each with the servers that it needs."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from chat import CHAT_OPTIONS, Chat, talk
from client import ask, greedy
from connector import POLICIES, Connector
from failures import Failures, provoke
from hybrid import Rows, compare
from model import huggingface_directory
from overlap import EXTRA, OVERLAP_OPTIONS, PROXY_OPTIONS, Overlap, kill
from parity import check, plain_answers
from prompts import Prompts
from random_models import HYBRID, LLAMA
from routers import TOPOLOGIES, Routers, route
from servers import Settings, fleet_group, plain_server, router_group, server_pair
from stale import DECODE_OPTIONS, LEASE_S, PREFILL_OPTIONS, Harness, Stale
from ttft import TimeToFirstToken
from upstream import Upstream, checks_in, run_checks

from llm_datadist.cli.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from parity import Parity
    from random_models import RandomModel

    Tokens = tuple[int, ...]

#: of the prompts with shared beginnings: a middling one to warm up with, and two long pairs
_FOR_FAILURES = (3, 4, 8, 9, 13)

_RANKS, _BLOCKS = "--tensor-parallel-size", "--block-size"
#: vLLM's options of prefill and of decode; 128 is the size of blocks without
SHAPES = {
    "TP 2 to 1": ((_RANKS, "2"), ()),
    "TP 1 to 2": ((), (_RANKS, "2")),
    "blocks of 32 to 128": ((_BLOCKS, "32"), (_BLOCKS, "128")),
    "blocks of 128 to 32": ((_BLOCKS, "128"), (_BLOCKS, "32")),
    "TP 2 to 1, blocks of 128 to 32": ((_RANKS, "2"), (_BLOCKS, "32")),
}


class Session:
    """One run. Plain answers are computed once."""

    def __init__(
        self, build: Path, logs: Path, connector: Connector, report: Callable[[str], None]
    ) -> None:
        self._build, self._logs = build, logs
        self._connector = connector
        self._report = report
        #: by the prompt's index
        self._expected: dict[int, Tokens] = {}

    @cached_property
    def _settings(self) -> Settings:
        self._report("the model is looked for, and made if there is none")
        return Settings(huggingface_directory(self._build), self._logs)

    @cached_property
    def _texts(self) -> Prompts:
        return Prompts(self._settings.model)

    @cached_property
    def _prompts(self) -> list[list[int]]:
        return self._texts.with_shared_beginnings()

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

    def hybrid(self) -> Rows:
        """Models of every kind of KV cache, each beside itself as one server."""
        rows = []
        for model in HYBRID:
            settings = self._of_random_model(model)
            self._report(f"{model.name} starts, alone and with {self._connector.vllm_name}")
            with (
                plain_server(settings) as plain,
                server_pair(settings, self._connector, "fail") as pair,
            ):
                row = compare(
                    model.name, model.groups, plain, pair, self._report,
                    needs_same_batch=model.needs_same_batch,
                )  # fmt: skip
                rows.append(row)
        return Rows("hybrid", rows)

    def shapes(self) -> Rows:
        """One model, by prefill and decode of other sizes, beside itself as one server."""
        rows = []
        settings = self._of_random_model(LLAMA)
        self._report(f"{LLAMA.name} starts alone")
        with plain_server(settings) as plain:
            for name, options in SHAPES.items():
                self._report(f"{name} starts with {self._connector.vllm_name}")
                with server_pair(settings, self._connector, "fail", *options) as pair:
                    rows.append(compare(name, LLAMA.groups, plain, pair, self._report))
        return Rows("shapes", rows)

    def overlap(self) -> Overlap:
        """Prompts that are read while they are computed. Raises CommandError for NixlConnector."""
        if self._connector is Connector.NIXL:
            raise CommandError("overlap: this part is for llm-datadist alone")
        settings = self._of_random_model(LLAMA)
        self._report(f"{LLAMA.name} starts, alone and with {self._connector.vllm_name}")
        options = OVERLAP_OPTIONS, (), EXTRA, PROXY_OPTIONS
        with (
            plain_server(settings) as plain,
            server_pair(settings, self._connector, "fail", *options) as pair,
        ):
            ask(pair.proxy, greedy([1], 1))  # the first is not overlapped
            row = compare("chunks of 64 tokens", LLAMA.groups, plain, pair, self._report)
            return Overlap(row, kill(plain, pair, self._report))

    def chat(self) -> Chat:
        """A conversation in which prefill reads what decode has answered."""
        if self._connector is Connector.NIXL:
            raise CommandError("chat: this part is for llm-datadist alone")
        settings = self._of_random_model(LLAMA)
        self._report(f"{LLAMA.name} starts, alone and with {self._connector.vllm_name}")
        with (
            plain_server(settings) as plain,
            server_pair(
                settings, self._connector, "fail", CHAT_OPTIONS, CHAT_OPTIONS, are_both=True
            ) as pair,
        ):
            return talk(plain, pair, self._report)

    def routers(self) -> Routers:
        """vllm-router in front of one and of two of each kind."""
        rows = []
        settings = self._of_random_model(LLAMA)
        self._report(f"{LLAMA.name} starts alone")
        with plain_server(settings) as plain:
            for topology in TOPOLOGIES:
                self._report("{} prefills and {} decodes start".format(*topology))
                with router_group(settings, self._connector, *topology) as group:
                    rows += route(plain, group, self._report)
        return Routers("routers", rows)

    def fleet(self) -> Routers:
        """Two of each kind that announce themselves. Raises CommandError for NixlConnector."""
        if self._connector is Connector.NIXL:
            raise CommandError("fleet: this part is for llm-datadist alone")
        settings = self._of_random_model(LLAMA)
        self._report(f"{LLAMA.name} starts, alone and as a fleet")
        with (
            plain_server(settings) as plain,
            fleet_group(settings, self._connector, *TOPOLOGIES[-1]) as group,
        ):
            return Routers("fleet", route(plain, group, self._report, may_fail=False))

    def upstream(self, source: Path | None) -> Upstream:
        """vLLM's own checks, and its proxy. Raises SetupError without its sources."""
        folder = checks_in(source)
        self._report(f"servers start, alone and with {self._connector.vllm_name}")
        with (
            plain_server(self._settings) as plain,
            server_pair(
                self._settings,
                self._connector,
                "fail",
                are_both=True,
                toy_proxy=folder / "toy_proxy_server.py",
            ) as pair,
        ):
            return run_checks(folder, plain, pair, self._logs, self._report)

    def stale(self) -> Stale:
        """Blocks that hold something else by the time they are read."""
        settings = self._of_random_model(LLAMA)
        self._report(f"{LLAMA.name} starts, alone and with {self._connector.vllm_name}")
        options = PREFILL_OPTIONS, DECODE_OPTIONS, {"kv_lease_duration": LEASE_S}
        with (
            plain_server(settings) as plain,
            server_pair(settings, self._connector, "fail", *options) as pair,
        ):
            return Harness(plain, pair, self._report).run()

    def _of_random_model(self, model: RandomModel) -> Settings:
        logs = self._logs / model.name
        logs.mkdir(exist_ok=True)
        return Settings(model.directory(self._build), logs, model.dtype)

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
