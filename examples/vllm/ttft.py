"""How long the first token takes, with one connector and the other in turn.

NIXL's threads poll, each a core, also while nothing is to do; on a machine with few cores that
would be all that is seen. So threads that are busy then are put behind all others (SCHED_IDLE):
what is compared is what the engines wait for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from client import first_token_s, greedy, num_loaded_tokens, prefill
from connector import Connector
from rich.table import Table

from llm_datadist.cli.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prompts import Prompts
    from servers import Pair

PROMPT_TOKENS = (37, 150, 600, 1535)
_FEW_TOKENS = 16
#: decode has one more token than the first to compute, so that its answer is a stream
_NUM_NEW_TOKENS = 2


@dataclass(slots=True)
class Samples:
    """Of one connector and one length."""

    #: from asking decode, when prefill is through, to its first token
    decode_s: list[float] = field(default_factory=list)
    #: from asking the proxy to the first token
    end_to_end_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class TimeToFirstToken:
    """The samples of both connectors, and the prompts that are left to make unique ones."""

    samples: dict[Connector, dict[int, Samples]] = field(default_factory=dict)
    paths: dict[Connector, str] = field(default_factory=dict)
    _num_prompts: int = 0

    def ratio(self, num_tokens: int) -> float | None:
        """Decode's median with llm-datadist as a part of NixlConnector's, if both are measured."""
        medians = [
            median(self.samples[connector][num_tokens].decode_s)
            for connector in Connector
            if connector in self.samples
        ]
        return medians[0] / medians[1] if len(medians) == len(Connector) else None

    @property
    def verdict(self) -> str:
        """For the closing line: the worst length counts."""
        ratios = [ratio for tokens in PROMPT_TOKENS if (ratio := self.ratio(tokens)) is not None]
        if ratios:
            return f"ttft {max(ratios):.2f} of NixlConnector"
        return "; ".join(
            f"ttft with {each.vllm_name} {self.medians(each)}" for each in self.samples
        )

    def medians(self, connector: Connector) -> str:
        """Decode's medians so far."""
        return ", ".join(
            f"{num_tokens} tokens {median(samples.decode_s) * 1e3:.0f} ms"
            for num_tokens, samples in self.samples[connector].items()
        )

    def measure(
        self,
        pair: Pair,
        connector: Connector,
        prompts: Prompts,
        num_each: int,
        report: Callable[[str], None],
    ) -> None:
        """Add `num_each` samples of each length. Raises CommandError if prefill was not used."""
        lengths = self.samples.setdefault(
            connector, {tokens: Samples() for tokens in PROMPT_TOKENS}
        )
        # The first request links the two and touches memory for the first time; each length once.
        for num_tokens in PROMPT_TOKENS:
            first_token_s(pair.proxy, greedy(self._unique(prompts, num_tokens), _NUM_NEW_TOKENS))
        behind = sum(each.put_pollers_behind() for each in (pair.prefill, pair.decode))
        report(f"{connector.vllm_name}: {behind} threads poll, and get what others leave")
        before = num_loaded_tokens(pair.decode)
        for sample in range(num_each):
            report(f"{connector.vllm_name}: sample {sample + 1} of {num_each} for each length")
            for num_tokens, samples in lengths.items():
                request = greedy(self._unique(prompts, num_tokens), _NUM_NEW_TOKENS)
                ready = prefill(pair.prefill, request)
                # What an engine still computes for the answer before, in vain, is not measured.
                first_token_s(pair.decode, greedy(self._unique(prompts, _FEW_TOKENS), 1))
                samples.decode_s.append(first_token_s(pair.decode, ready))
                request = greedy(self._unique(prompts, num_tokens), _NUM_NEW_TOKENS)
                samples.end_to_end_s.append(first_token_s(pair.proxy, request))
        loaded = num_loaded_tokens(pair.decode) - before
        # A connector may leave the last token, or the last block, to decode.
        if loaded * 2 < 2 * num_each * sum(PROMPT_TOKENS):
            raise CommandError(
                f"with {connector.vllm_name}, decode had only {loaded} prompt tokens from "
                f"prefill and computed the others: see {pair.decode.log}"
            )
        self.paths[connector] = connector.path_used(pair.decode.log)

    def figures(self) -> dict[str, object]:
        """For JSON."""
        return {
            "paths": {connector.vllm_name: path for connector, path in self.paths.items()},
            "samples": {
                connector.vllm_name: {
                    tokens: asdict(samples) for tokens, samples in lengths.items()
                }
                for connector, lengths in self.samples.items()
            },
            "decode_ratios": {tokens: self.ratio(tokens) for tokens in PROMPT_TOKENS},
        }

    def table(self) -> Table:
        """A row a length and connector."""
        table = Table("prompt\ntokens", "connector", "path")
        for heading in ("decode's first\ntoken ms", "of Nixl's", "end to end\nms", "samples"):
            table.add_column(heading, justify="right")
        for num_tokens, connector, samples in self._rows():
            ratio = self.ratio(num_tokens) if connector is Connector.LLM_DATADIST else None
            table.add_row(
                str(num_tokens),
                connector.vllm_name,
                self.paths.get(connector, ""),
                f"{median(samples.decode_s) * 1e3:.1f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{median(samples.end_to_end_s) * 1e3:.1f}",
                str(len(samples.decode_s)),
            )
        return table

    def _rows(self) -> Iterator[tuple[int, Connector, Samples]]:
        for num_tokens in PROMPT_TOKENS:
            for connector, lengths in self.samples.items():
                yield num_tokens, connector, lengths[num_tokens]

    def _unique(self, prompts: Prompts, num_tokens: int) -> list[int]:
        self._num_prompts += 1
        return prompts.unique(self._num_prompts, num_tokens)
