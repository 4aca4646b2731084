"""The decode worker: pulls a request's blocks and goes on where prefill stopped.

It never sees a prompt. What it knows of a request is a `HandOver`, and the blocks that it pulls.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llm_datadist import BlocksCacheKey
from llm_datadist.cli.demo.blocks import BlockPool
from llm_datadist.cli.demo.cluster import (
    PREFILL_CLUSTER,
    decode_cluster,
    linked_to_prefill,
    register,
)
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
from llm_datadist.cli.demo.paged import PagedCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import DynamicCache

    from llm_datadist import Cache, LLMDataDist
    from llm_datadist.cli.demo.messages import ToParent
    from llm_datadist.cli.demo.settings import Settings
    from llm_datadist.cli.demo.worker import ToProxy

#: not prefill's, so that a request's block numbers differ on the two sides
_SEED = 2


def serve(parent: ToProxy, settings: Settings) -> None:
    """Answer the parent until it hangs up, which raises EOFError."""
    with decode_cluster(settings) as cluster:
        model = LanguageModel.load(
            settings, lambda fraction, doing: parent.send(Loading("decode", fraction, doing))
        )
        pages = PagedCache.for_requests(model.page_shape(settings.block_tokens))
        puller = Puller(cluster, register(cluster, pages), pages)
        decode = Decode(model, puller, settings.max_new_tokens, parent.send)
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


class Puller:
    """Fetches requests out of prefill's memory into caches of this process."""

    def __init__(self, cluster: LLMDataDist, cache: Cache, pages: PagedCache) -> None:
        self._manager = cluster.cache_manager
        self._cache = cache
        self._pages = pages
        self._pool = BlockPool(pages.num_blocks, _SEED)

    def pull(self, request: HandOver) -> tuple[DynamicCache, Pulled]:
        """The request's KV cache, and what it took to get it here."""
        blocks = self._pool.allocate(len(request.blocks))
        key = BlocksCacheKey(PREFILL_CLUSTER, 0)
        begin_s = time.perf_counter()
        self._manager.pull_blocks(key, self._cache, request.blocks, blocks)
        duration_s = time.perf_counter() - begin_s
        cache = self._pages.gather(blocks, request.num_tokens)
        # transformers goes on with its own copy, so the blocks are free for the next request
        self._pages.erase(blocks)
        self._pool.free(blocks)
        nbytes = len(blocks) * self._pages.shape.block_nbytes
        return cache, Pulled(request.request_id, nbytes, duration_s)


class Answer:
    """One request's tokens so far, and their text."""

    def __init__(self, request_id: int, cache: DynamicCache) -> None:
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
    """The answers under way, one token each in turn."""

    def __init__(
        self,
        model: LanguageModel,
        puller: Puller,
        max_new_tokens: int,
        send: Callable[[ToParent], None],
    ) -> None:
        self._model = model
        self._puller = puller
        self._max_new_tokens = max_new_tokens
        self._send = send
        self._answers: list[Answer] = []

    @property
    def is_busy(self) -> bool:
        """Whether there is a token to compute."""
        return bool(self._answers)

    def admit(self, request: HandOver) -> None:
        """Pull the request and stream its first token, which prefill has computed."""
        cache, pulled = self._puller.pull(request)
        self._send(pulled)
        answer = Answer(request.request_id, cache)
        self._answers.append(answer)
        self._add(answer, request.first_token)

    def step(self) -> None:
        """Compute and stream one more token of every answer."""
        for answer in tuple(self._answers):
            self._add(answer, self._model.next_token(answer.tokens[-1:], answer.cache))

    def _add(self, answer: Answer, token: int) -> None:
        answer.tokens.append(token)
        piece = answer.grow(self._model.decode(answer.tokens))
        self._send(Token(answer.request_id, token, piece))
        if token in self._model.end_tokens or len(answer.tokens) == self._max_new_tokens:
            self._answers.remove(answer)
            self._send(Finished(answer.request_id))
