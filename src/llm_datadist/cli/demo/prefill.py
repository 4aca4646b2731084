"""The prefill worker: computes a prompt's KV cache into blocks, and hands over their numbers."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from llm_datadist.cli.demo.cluster import listening_port, make_pool, prefill_cluster
from llm_datadist.cli.demo.failure import DemoError
from llm_datadist.cli.demo.messages import (
    Compute,
    Free,
    Generate,
    Generated,
    HandOver,
    Loading,
    Ready,
)
from llm_datadist.cli.demo.model import LanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.cli.demo.messages import ToParent, ToWorker
    from llm_datadist.cli.demo.settings import Settings
    from llm_datadist.cli.demo.worker import ToProxy
    from llm_datadist.integrations.transformers import KVHandle, KVPool

_SEED = 1


def serve(parent: ToProxy, settings: Settings) -> None:
    """Answer the parent until it hangs up, which raises EOFError."""
    # Before the model is loaded: a port that is taken should be known at once.
    with prefill_cluster(settings) as cluster:
        model = LanguageModel.load(
            settings, lambda fraction, doing: parent.send(Loading("prefill", fraction, doing))
        )
        pool = make_pool(cluster, model.kv_shape(settings.block_tokens), _SEED)
        prefill = Prefill(model, pool, settings.max_new_tokens, parent.send)
        parent.send(Ready("prefill", listening_port(cluster)))
        while True:
            prefill.handle(parent.recv())


class Prefill:
    """The requests whose blocks are in use here, and those that wait for blocks."""

    def __init__(
        self,
        model: LanguageModel,
        pool: KVPool,
        max_new_tokens: int,
        send: Callable[[ToParent], None],
    ) -> None:
        self._model = model
        self._pool = pool
        self._max_new_tokens = max_new_tokens
        self._send = send
        self._tokens: dict[int, list[int]] = {}
        self._handles: dict[int, KVHandle] = {}
        self._waiting: deque[int] = deque()

    def handle(self, message: ToWorker) -> None:
        """Do what the parent asks."""
        if isinstance(message, Compute):
            self._tokens[message.request_id] = self._model.encode(message.prompt)
            self._waiting.append(message.request_id)
        elif isinstance(message, Free):
            self._pool.release(self._handles.pop(message.request_id))
        elif isinstance(message, Generate):
            tokens = self._model.generate(self._tokens[message.request_id], self._max_new_tokens)
            self._send(Generated(message.request_id, tuple(tokens)))
        while self._waiting and self._has_room_for(self._waiting[0]):
            self._compute(self._waiting.popleft())

    def _has_room_for(self, request_id: int) -> bool:
        num_blocks = self._num_blocks(request_id)
        if num_blocks > self._pool.num_blocks:
            raise DemoError(
                f"prompt {request_id} needs {num_blocks} blocks, and prefill has "
                f"{self._pool.num_blocks}: this model's tokenizer makes too many tokens of it."
            )
        return num_blocks <= self._pool.num_free_blocks

    def _compute(self, request_id: int) -> None:
        tokens = self._tokens[request_id]
        cache = self._pool.new_cache()
        first_token = self._model.next_token(tokens, cache)
        handle = self._handles[request_id] = self._pool.publish(cache)
        self._send(
            HandOver(
                request_id, handle.num_tokens, len(handle.blocks), handle.to_json(), first_token
            )
        )

    def _num_blocks(self, request_id: int) -> int:
        return self._pool.shape.num_blocks(len(self._tokens[request_id]))
