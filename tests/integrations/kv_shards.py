"""Workers of tensor-parallel ranks and stages, each with its part of the KV of a prompt.

As of vLLM's CPU backends: K of a head lies element by element and V behind it token by token, or
there is one latent vector a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from kv_engine import NUM_BLOCKS, Request, Status

from llm_datadist import KVHeads
from llm_datadist.integrations.vllm.consumer import ConsumerScheduler
from llm_datadist.integrations.vllm.forms import Form
from llm_datadist.integrations.vllm.groups import Group
from llm_datadist.integrations.vllm.producer import ProducerScheduler
from llm_datadist.integrations.vllm.request import digest_of
from llm_datadist.integrations.vllm.settings import Extra, Settings
from llm_datadist.integrations.vllm.step import Announcement, Chunk, Grant, Step
from llm_datadist.integrations.vllm.worker import Worker
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADS, SIZE, LAYERS = 2, 6, 4


def kinds() -> list[str]:
    return ["heads", "latent"]


class Shard:
    """One worker; the scheduler's part is played by the first."""

    def open(
        self,
        role: str,
        port: int,
        number: int,
        size: int,
        stages: int,
        block_tokens: int,
        kind: str,
        overlap: bool = False,
    ) -> None:
        self.settings = Settings(
            engine_id=role, role=role, port=port, extra=Extra(pull_timeout_s=5, overlap=overlap)
        )
        self.size, self.stages, self.kind, self.block_tokens = size, stages, kind, block_tokens
        stage, rank = divmod(number, size)
        each = LAYERS // stages
        self.layers = range(stage * each, (stage + 1) * each)
        self.heads = KVHeads.share(HEADS, rank, size)
        if kind == "heads":
            form = Form.k_then_v("CPU_ATTN", self.heads, SIZE, 4, block_tokens)
            shape = (NUM_BLOCKS, self.heads.count, block_tokens, 2 * SIZE)
        else:
            form = Form.latent("CPU_MLA", SIZE, 4, block_tokens)
            shape = (NUM_BLOCKS, 1, block_tokens, SIZE)
        self.kv = {f"layers.{layer}": torch.full(shape, -1.0) for layer in self.layers}
        self.group = Group(tuple(self.kv), block_tokens)
        self.worker = Worker(
            self.settings, number, {"model": "numbers"}, self.kv, NUM_BLOCKS, [self.group],
            dict.fromkeys(self.kv, form), size, NUM_BLOCKS * block_tokens,
        )  # fmt: skip
        self.consumer = ConsumerScheduler(overlaps=overlap)

    def close(self) -> None:
        self.worker.close()

    def touched_blocks(self) -> set[int]:
        """Blocks into which anything was written."""
        return {
            block
            for block in range(NUM_BLOCKS)
            if any(bool((memory[block] != -1.0).any()) for memory in self.kv.values())
        }

    # -- prefill -----------------------------------------------------------------------------------

    def new_lease(self) -> Grant:
        self.producer = ProducerScheduler(self.settings, [self.group], self.size, self.stages)
        self.request = Request("r", None, {"do_remote_decode": True})
        self.request.prompt_token_ids = [0]
        self.producer.scheduled(self.request)
        step = Step()
        self.producer.fill(step)
        (grant,) = step.grants
        return grant

    def prefill(self, tokens: list[int], blocks: list[int], grant: Grant) -> None:
        for place, number in self.numbers(tokens, blocks):
            place[...] = number
        self.lease = grant.lease
        self.worker.apply(Step(grants=[grant], holds={"r": grant.lease}))

    def announce(self, tokens: list[int], blocks: list[int], grant: Grant, name: str) -> None:
        """All of the prompt is computed next, by `compute_layer`."""
        self.computed = tokens, blocks
        self.lease = grant.lease
        digest = digest_of(Request("r", tokens, None), len(tokens))
        announced = Announcement(grant.lease, name, len(tokens), digest)
        chunk = Chunk(grant.lease, [blocks], len(tokens))
        self.worker.apply(Step(grants=[grant], announcements=[announced], chunks=[chunk]))

    def compute_layer(self, name: str) -> None:
        """If it is of this stage."""
        if name not in self.kv:
            return
        tokens, blocks = self.computed
        for place, number in self.numbers(tokens, blocks, name):
            place[...] = number
        self.worker.layer_saved(name)

    def handed_over(self, tokens: list[int], blocks: list[int], grant: Grant) -> Any:
        request = self.request
        request.prompt_token_ids, request.num_prompt_tokens = tokens, len(tokens)
        request._all_token_ids = list(tokens)
        request.num_computed_tokens = len(tokens)
        request.status = Status.FINISHED_LENGTH_CAPPED
        return self.producer.finished(request, [blocks])

    def end_lease(self) -> None:
        """As a worker's that was started again."""
        self.worker.apply(Step(drops=[self.lease]))

    def is_kept(self) -> bool:
        return not self.worker.take_sent()

    def is_sent(self) -> bool:
        return eventually(lambda: "r" in self.worker.take_sent(), 10.0)

    # -- decode ------------------------------------------------------------------------------------

    def read(self, request_id: str, tokens: list[int], params: Any, blocks: list[int]) -> str:
        self.load(request_id, tokens, params, blocks)
        return self.outcome(request_id, tokens, blocks)

    def load(self, request_id: str, tokens: list[int], params: Any, blocks: list[int]) -> None:
        """As `read`, without waiting for its end, which `outcome` does."""
        request = Request(request_id, tokens, params)
        self.consumer.arrived(request)
        count = self.consumer.num_matched_tokens(request, 0)
        assert count == len(tokens)
        self.consumer.allocated(request, [blocks], count)
        step = Step()
        self.consumer.fill(step)
        self.worker.apply(step)

    def outcome(self, request_id: str, tokens: list[int], blocks: list[int]) -> str:
        assert eventually(lambda: request_id in self.worker.take_received(), 20.0)
        if self.worker.take_failed():
            return "failed"
        self.ended = request_id
        return "right" if self.has(tokens, blocks) else "wrong"

    def has(self, tokens: list[int], blocks: list[int], layer: str | None = None) -> bool:
        """Whether these blocks hold the vectors of these tokens; of all layers, or this one."""
        numbers = self.numbers(tokens, blocks, layer)
        return all(bool((place == number).all()) for place, number in numbers)

    def done(self) -> None:
        """All workers have read: what a scheduler says then."""
        self.consumer.received([self.ended])
        step = Step()
        self.consumer.fill(step)
        self.worker.apply(step)

    # --------------------------------------------------------------------------------------------

    def numbers(
        self, tokens: list[int], blocks: list[int], only: str | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """Where in memory which vector belongs; of all layers, or that one."""
        size = self.block_tokens
        for layer, (name, memory) in zip(self.layers, self.kv.items(), strict=True):
            if only not in (None, name):
                continue
            for position, token in enumerate(tokens):
                block, inside = blocks[position // size], position % size
                if self.kind == "latent":
                    yield memory[block, 0, inside], vector(token, layer, 0)
                    continue
                for place, head in enumerate(range(self.heads.first, self.heads.stop)):
                    k, v = memory[block, place].reshape(2, -1)
                    yield k.reshape(SIZE, size)[:, inside], vector(token, layer, 2 * head)
                    yield v.reshape(size, SIZE)[inside], vector(token, layer, 2 * head + 1)


def vector(token: int, layer: int, which: int) -> Any:
    begin = ((token * LAYERS + layer) * 2 * HEADS + which) * SIZE
    return torch.arange(begin, begin + SIZE, dtype=torch.float32)
