"""An engine with vLLM's part of the connector's calls, and without its model.

The KV of a token is a number made of the token and the layer, so that every block can be checked;
that of a state is one made of all tokens.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from llm_datadist.integrations.vllm.consumer import ConsumerScheduler
from llm_datadist.integrations.vllm.groups import NULL_BLOCK, Group
from llm_datadist.integrations.vllm.producer import ProducerScheduler
from llm_datadist.integrations.vllm.settings import Extra, Settings
from llm_datadist.integrations.vllm.step import Step
from llm_datadist.integrations.vllm.worker import Worker
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    #: of a request, by group; of the only group without more ado
    Blocks: TypeAlias = "Sequence[int] | Sequence[Sequence[int]]"

BLOCK_SIZE = 4
NUM_BLOCKS = 32
NUM_LAYERS = 3
UNTOUCHED = -1.0
ONE_GROUP = (Group(tuple(f"layers.{layer}" for layer in range(NUM_LAYERS)), BLOCK_SIZE),)


class Status(Enum):
    RUNNING = 1
    FINISHED_LENGTH_CAPPED = 2
    FINISHED_ABORTED = 3
    FINISHED_STOPPED = 4


@dataclass
class Request:
    request_id: str
    prompt_token_ids: list[int] | None
    kv_transfer_params: Any
    num_computed_tokens: int = 0
    status: Status = Status.RUNNING
    lora_request: None = None
    mm_features: tuple[()] = ()
    max_tokens: int = 16
    skip_reading_prefix_cache: bool = False

    def __post_init__(self) -> None:
        self._all_token_ids = list(self.prompt_token_ids or [])
        self.num_prompt_tokens = len(self._all_token_ids)


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._lines)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(f"{record.getMessage()}\n")


class Engine:
    """One process's scheduler and worker. What an engine does in a step, a test asks for."""

    worker: Worker
    producer: ProducerScheduler | None
    consumer: ConsumerScheduler

    def open(
        self,
        engine_id: str,
        role: str,
        port: int = 1,
        facts: dict[str, Any] | None = None,
        rank: int = 0,
        num_workers: int = 1,
        groups: Sequence[Group] = ONE_GROUP,
        share: bool = False,
        **extra: Any,
    ) -> None:
        """Starts anew, with empty memory. Of several workers this process has the one of `rank`.

        `share`: all layers lie in the same memory.
        """
        self.groups = groups
        settings = Settings(engine_id=engine_id, role=role, port=port, extra=Extra(**extra))
        overlaps = settings.extra.overlap and all(group.keeps_all for group in groups)
        self.kv = {
            layer: torch.full((NUM_BLOCKS, 2, group.block_tokens, 8), UNTOUCHED)
            for group in groups
            for layer in group.layers
        }
        if share:
            self.kv = dict.fromkeys(self.kv, next(iter(self.kv.values())))
        facts = facts or {"model": "numbers"}
        self.worker = Worker(
            settings, rank, facts, self.kv, NUM_BLOCKS, groups, num_ranks=num_workers,
            max_tokens=NUM_BLOCKS * groups[0].block_tokens,
        )  # fmt: skip
        self.producer = None
        if self.worker.advertised_host:
            self.producer = ProducerScheduler(settings, groups, num_workers)
            self.producer.told_of_workers({rank: self.worker.advertised_host})
            self.producer.told_of_starts({rank: self.worker.incarnation})
        self.consumer = ConsumerScheduler(has_directory="directory" in extra, overlaps=overlaps)
        self.requests: dict[str, Request] = {}
        self.sent: set[str] = set()
        self.received: set[str] = set()
        self.failed: set[str] = set()
        #: the blocks of those that were read; programs outside of this repository empty it
        self.failed_blocks: set[object] = set()
        self.log = Log()
        logging.getLogger("llm_datadist.integrations").addHandler(self.log)
        logging.getLogger("llm_datadist.integrations").setLevel(logging.INFO)

    def close(self) -> None:
        self.worker.close()
        logging.getLogger("llm_datadist.integrations").removeHandler(self.log)

    def log_text(self) -> str:
        return self.log.text

    def step(self) -> None:
        step = Step()
        self.consumer.fill(step)
        if self.producer:
            self.producer.fill(step)
        self.worker.apply(step)
        sent, received = self.worker.take_sent(), self.worker.take_received()
        assert not received & self.received, "a request has ended twice"
        self.failed |= self.worker.take_failed()
        assert self.failed <= self.received | received
        self.consumer.received(received)
        if self.producer:
            self.producer.sent(sent)
        self.sent |= sent
        self.received |= received

    def step_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.step()
        while time.monotonic() < end:
            self.step()

    def step_until_sent(self, request_id: str, within_s: float = 10.0) -> bool:
        def is_sent() -> bool:
            self.step()
            return request_id in self.sent

        return eventually(is_sent, within_s)

    def step_until_received(self, *request_ids: str, within_s: float = 10.0) -> bool:
        def is_received() -> bool:
            self.step()
            return self.received.issuperset(request_ids)

        if not eventually(is_received, within_s):
            return False
        self.step()  # the request runs, or ends
        return True

    # -- prefill -----------------------------------------------------------------------------------

    def prefill(
        self,
        request_id: str,
        tokens: list[int],
        blocks: Blocks,
        status: Status = Status.FINISHED_LENGTH_CAPPED,
        **more: Any,
    ) -> dict[str, Any] | None:
        """Computes a prompt in these blocks; what the decode request carries."""
        assert self.producer
        request = Request(request_id, tokens, {"do_remote_decode": True}, **more)
        self.requests[request_id] = request
        self.consumer.arrived(request)
        self.producer.arrived(request)
        self.producer.scheduled(request)
        self.step()
        for place, number in self.numbers(tokens[: request.num_prompt_tokens], blocks):
            place.fill_(number)
        return self.finish(request_id, blocks, status)

    def finish(
        self, request_id: str, blocks: Blocks, status: Status = Status.FINISHED_LENGTH_CAPPED
    ) -> dict[str, Any] | None:
        """The request has ended; what the decode request carries."""
        assert self.producer
        request = self.requests[request_id]
        request.num_computed_tokens, request.status = request.num_prompt_tokens, status
        return self.producer.finished(request, by_group(blocks))

    def announce(self, request_id: str, tokens: list[int], transfer_id: str) -> None:
        """A prompt that is read while it is computed: `begin_chunk` and `compute_layer` do that."""
        assert self.producer
        params = {"do_remote_decode": True, "transfer_id": transfer_id}
        self.requests[request_id] = request = Request(request_id, tokens, params)
        self.computed_blocks: list[int] = []
        self.producer.arrived(request)
        self.producer.scheduled(request)

    def begin_chunk(self, request_id: str, blocks: list[int], stop: int) -> None:
        """The next step computes the tokens before `stop`, of which these are all blocks."""
        assert self.producer
        self.chunk = request_id, blocks, stop
        self.producer.computes(request_id, [blocks[len(self.computed_blocks) :]], stop)
        self.computed_blocks = blocks
        self.step()

    def compute_layer(self, layer: int) -> None:
        """The chunk's; the last one ends the step."""
        request_id, blocks, stop = self.chunk
        tokens = self.requests[request_id].prompt_token_ids or []
        memory = self.kv[f"layers.{layer}"]
        for position in range(stop):
            block, inside = divmod(position, memory.shape[2])
            memory[blocks[block], :, inside] = number_of(tokens[position], layer)
        self.worker.layer_saved(f"layers.{layer}")
        if layer == len(self.kv) - 1:
            self.worker.all_saved()

    def preempt(self, request_id: str, blocks: list[int]) -> None:
        """Its blocks are another's from the next step on, which fills them with other numbers."""
        assert self.producer
        self.producer.preempted([request_id])
        self.step()
        for memory in self.kv.values():
            memory[blocks] = number_of(1, 1)

    # -- decode ------------------------------------------------------------------------------------

    def arrive(self, request_id: str, tokens: list[int], params: Any, **more: Any) -> None:
        self.requests[request_id] = request = Request(request_id, tokens, params, **more)
        self.consumer.arrived(request)
        if self.producer:
            self.producer.arrived(request)

    def schedule(self, request_id: str, blocks: Blocks, num_computed_tokens: int = 0) -> int:
        """Gives the request its blocks; how many tokens are to be read."""
        request = self.requests[request_id]
        count = self.consumer.num_matched_tokens(request, num_computed_tokens)
        self.consumer.allocated(request, by_group(blocks), count)
        if self.producer:
            self.producer.scheduled(request)
        return count

    def answer(self, request_id: str, tokens: list[int], blocks: Blocks) -> dict[str, Any] | None:
        """Goes on behind a prompt, which is here; what the next turn's prefill request carries.

        The KV of the last token is not computed, though it is counted: it was scheduled ahead.
        """
        assert self.producer
        request = self.requests[request_id]
        request._all_token_ids += tokens
        for place, number in self.numbers(request._all_token_ids[:-1], blocks):
            place.fill_(number)
        request.num_computed_tokens = len(request._all_token_ids)
        request.status = Status.FINISHED_STOPPED
        return self.producer.finished(request, by_group(blocks))

    def abort(self, request_id: str) -> None:
        request = self.requests[request_id]
        request.status = Status.FINISHED_ABORTED
        self.consumer.finished(request)

    def read(
        self, request_id: str, tokens: list[int], params: dict[str, Any], blocks: Blocks
    ) -> str:
        """From arrival to the end of the load: "right", "wrong" bytes, or "failed"."""
        self.arrive(request_id, tokens, params)
        count = len(tokens) - (not all(group.keeps_all for group in self.groups))
        assert self.schedule(request_id, blocks) == count
        assert self.step_until_received(request_id)
        if request_id in self.failed:
            self.failed_blocks.update(map(str, blocks))
            return "failed"
        return "right" if self.has(tokens[:count], blocks) else "wrong"

    def has_failed(self, *request_ids: str) -> bool:
        """Whether all of these were said to have nothing of use in their blocks."""
        return self.failed.issuperset(request_ids)

    def load(
        self, request_id: str, tokens: list[int], params: dict[str, Any] | None, blocks: list[int]
    ) -> None:
        """As `read`, without waiting for its end."""
        self.arrive(request_id, tokens, params)
        assert self.schedule(request_id, blocks) == len(tokens)
        self.step()

    def told_of_workers(self, hosts: dict[int, str]) -> None:
        """What other workers of the engine say, which are elsewhere."""
        assert self.producer
        self.producer.told_of_workers(hosts)

    def incarnation(self) -> str:
        return self.worker.incarnation

    def told_of_starts(self, incarnations: dict[int, str]) -> None:
        """As `told_of_workers`."""
        assert self.producer
        self.producer.told_of_starts(incarnations)

    def start_no_threads(self, *, is_so: bool = True) -> None:
        """From now on this process cannot start a thread, as at a limit on processes."""
        threading.stack_size(1 << 47 if is_so else 0)

    def received_requests(self) -> set[str]:
        return self.received

    def has(self, tokens: Sequence[int], blocks: Blocks) -> bool:
        """Whether these blocks hold the KV of these tokens, in all layers."""
        return all(bool((place == number).all()) for place, number in self.numbers(tokens, blocks))

    def numbers(
        self, tokens: Sequence[int], blocks: Blocks
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """Where in memory which number belongs, as far as the group keeps it."""
        layers = iter(range(len(self.kv)))
        for group, ids in zip(self.groups, by_group(blocks), strict=True):
            first = group.first_block(len(tokens))
            for name in group.layers:
                memory, layer = self.kv[name], next(layers)
                if group.kept == "state":
                    yield memory[ids[first]], number_of(sum(tokens), layer)
                    continue
                for position in range(first * group.block_tokens, len(tokens)):
                    block, inside = divmod(position, group.block_tokens)
                    assert group.keeps_all or ids[block] != NULL_BLOCK
                    yield memory[ids[block], :, inside], number_of(tokens[position], layer)

    def has_in_layer(self, layer: int, tokens: Sequence[int], blocks: list[int]) -> bool:
        """The same of one layer, of the only group."""
        memory, size = self.kv[f"layers.{layer}"], self.groups[0].block_tokens
        return all(
            bool((memory[blocks[at // size], :, at % size] == number_of(token, layer)).all())
            for at, token in enumerate(tokens)
        )

    def touched_blocks(self) -> set[int]:
        """Blocks into which anything was written."""
        return {
            block
            for block in range(NUM_BLOCKS)
            if any(bool((memory[block] != UNTOUCHED).any()) for memory in self.kv.values())
        }

    def paths(self) -> list[str]:
        return self.worker.paths()

    def counts(self) -> dict[str, Any]:
        return self.worker.take_counts()


def by_group(blocks: Blocks) -> list[list[int]]:
    groups = [ids for ids in blocks if isinstance(ids, Sequence)]
    return [list(ids) for ids in groups] or [[ids for ids in blocks if isinstance(ids, int)]]


def number_of(token: int, layer: int) -> float:
    return float(token * NUM_LAYERS + layer)
