"""The decode worker: fetches a request's blocks and goes on where prefill stopped.

It never sees a prompt. What it knows of a request is a `HandOver`, and the blocks that it fetches.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from llm_datadist.cli.demo.cluster import decode_cluster, linked_to_prefill, make_pool
from llm_datadist.cli.demo.messages import (
    Finished,
    HandOver,
    Link,
    Loading,
    Pulled,
    Ready,
    Token,
)
from llm_datadist.cli.demo.model import LanguageModel
from llm_datadist.integrations.transformers import KVHandle

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.cli.demo.messages import ToParent
    from llm_datadist.cli.demo.settings import Settings
    from llm_datadist.cli.demo.worker import ToProxy
    from llm_datadist.integrations.transformers import KVPool, PagedCache

#: not prefill's, so that a request's block numbers differ on the two sides
_SEED = 2


def serve(parent: ToProxy, settings: Settings) -> None:
    """Answer the parent until it hangs up, which raises EOFError."""
    with decode_cluster(settings) as cluster:
        model = LanguageModel.load(
            settings, lambda fraction, doing: parent.send(Loading("decode", fraction, doing))
        )
        shape = model.kv_shape(settings.block_tokens)
        pool = make_pool(cluster, shape, _SEED, settings.max_new_tokens)
        decode = Decode(model, pool, settings.max_new_tokens, parent.send)
        parent.send(Ready("decode", port=0))
        order = parent.recv()
        assert isinstance(order, Link)
        with linked_to_prefill(cluster, settings, order.port) as linked:
            parent.send(linked)
            _decode_until_hang_up(parent, decode)


def _decode_until_hang_up(parent: ToProxy, decode: Decode) -> None:
    while True:
        # With answers under way, only look for new requests between two tokens.
        while not decode.is_busy or parent.poll():
            order = parent.recv()
            assert isinstance(order, HandOver)
            decode.admit(order)
        decode.step()


class Answer:
    """One request's tokens so far, and their text."""

    def __init__(self, request_id: int, cache: PagedCache) -> None:
        self.request_id = request_id
        self.cache = cache
        self.tokens: list[int] = []
        self._text = ""

    def grow(self, text: str) -> str:
        """Take `text` as the text of all tokens, and return what is new in it."""
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # a character that the next token completes
        piece, self._text = text[len(self._text) :], text
        return piece


class Decode:
    """The answers under way, one token each in turn, and the requests that wait for blocks."""

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
        self._answers: list[Answer] = []
        self._waiting: deque[HandOver] = deque()

    @property
    def is_busy(self) -> bool:
        """Whether there is a token to compute."""
        return bool(self._answers)

    def admit(self, request: HandOver) -> None:
        """Fetch the request, as soon as there are blocks for the whole of its answer."""
        self._waiting.append(request)
        self._fetch_waiting()

    def step(self) -> None:
        """Compute and stream one more token of every answer."""
        for answer in tuple(self._answers):
            self._add(answer, self._model.next_token(answer.tokens[-1:], answer.cache))
        self._fetch_waiting()

    def _fetch_waiting(self) -> None:
        while self._waiting:
            request = self._waiting[0]
            most_tokens = request.num_tokens + self._max_new_tokens
            if self._pool.shape.num_blocks(most_tokens) > self._pool.num_free_blocks:
                return
            self._waiting.popleft()
            cache = self._fetch(request)
            cache.reserve(most_tokens)
            answer = Answer(request.request_id, cache)
            self._answers.append(answer)
            self._add(answer, request.first_token)

    def _fetch(self, request: HandOver) -> PagedCache:
        handle = KVHandle.from_json(request.handle)
        begin_s = time.perf_counter()
        cache = self._pool.fetch(handle)
        duration_s = time.perf_counter() - begin_s
        nbytes = len(handle.blocks) * handle.shape.block_nbytes
        self._send(Pulled(request.request_id, nbytes, duration_s))
        return cache

    def _add(self, answer: Answer, token: int) -> None:
        answer.tokens.append(token)
        piece = answer.grow(self._model.decode(answer.tokens))
        self._send(Token(answer.request_id, token, piece))
        if token in self._model.end_tokens or len(answer.tokens) == self._max_new_tokens:
            self._answers.remove(answer)
            answer.cache.release()
            self._send(Finished(answer.request_id))
