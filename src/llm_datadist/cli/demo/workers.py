"""The objects in the two worker processes: Prefill and Decode.

The parent calls their methods, through `Worker.told`; each yields what the parent is to know, as
soon as it is so. The parent imports this file too, and does without torch: `model`, and the
integration, are imported when they are needed.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING, ClassVar, Final

from llm_datadist.cli.demo.request import (
    Generated,
    HandOver,
    Linked,
    Listening,
    Loading,
    Pulled,
    Token,
)
from llm_datadist.cli.demo.settings import LinkPath
from llm_datadist.cli.failure import CommandError, SetupError
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.observe.log import LOGGER_NAME
from llm_datadist.testing.cluster import Node
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from llm_datadist.cli.demo.model import LanguageModel
    from llm_datadist.cli.demo.request import Event, Prompt
    from llm_datadist.cli.demo.settings import Settings
    from llm_datadist.integrations.transformers import KVHandle, KVPool, PagedCache

_PREFILL_CLUSTER: Final = 1
_DECODE_CLUSTER: Final = 2
_HOST = "127.0.0.1"
_TIMEOUT_MS = 10_000


class Worker:
    """What both have: a cluster, a model, and a pool of blocks."""

    name: ClassVar[str]
    #: of the order of the pool's blocks; a request's numbers are to differ on the two sides
    _seed: ClassVar[int]
    _model: LanguageModel
    _pool: KVPool

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._node = Node()
        self._errors = LoggedErrors()
        # Everything is on this machine: without this, transformers would ask the network first.
        os.environ["HF_HUB_OFFLINE"] = "1"

    def told(self, method: Callable[..., Iterable[Event]], *args: object) -> Iterator[Event]:
        """What `method(self, *args)` yields; whatever goes wrong is told as a CommandError.

        The parent owns the terminal, and cannot unpickle the exceptions of every package.
        """
        try:
            yield from method(self, *args)
        except CommandError as error:
            raise type(error)(self._errors.added_to(str(error))) from None
        except Exception as error:
            message = self._errors.added_to(f"{self.name} failed: {error!r}")
            raise CommandError(f"{message}\n{traceback.format_exc()}") from None

    def close(self) -> Iterable[Event]:
        """Let go of the other worker, and of all memory."""
        self._node.stop()
        return ()

    def _start_cluster(self, role: LLMRole, cluster_id: int, **more: object) -> int:
        return self._node.start(
            role,
            cluster_id,
            enable_remote_cache_accessible=True,
            sync_kv_timeout=_TIMEOUT_MS,
            transfer_path=self._settings.path.value,
            **more,
        )

    def _load(self, num_answer_tokens: int) -> Iterator[Loading]:
        settings = self._settings
        yield Loading(0.0, "importing torch")
        from llm_datadist.cli.demo.model import LanguageModel, make_pool

        self._model = yield from LanguageModel.load(settings)
        shape = self._model.kv_shape(settings.block_tokens)
        self._pool = make_pool(self._node.datadist, shape, self._seed, num_answer_tokens)
        yield Loading(1.0, "ready")


class Prefill(Worker):
    """Computes a prompt's KV cache into blocks, and hands over their numbers.

    It has the requests whose blocks are in use, and those that wait for blocks.
    """

    name = "prefill"
    _seed = 1

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._tokens: dict[int, list[int]] = {}
        self._handles: dict[int, KVHandle] = {}
        self._waiting: deque[int] = deque()

    def load(self) -> Iterator[Listening | Loading]:
        """Listen, and load the model. A port that is taken should be known at once."""
        port = self._settings.port
        try:
            listening = self._start_cluster(
                LLMRole.PROMPT, _PREFILL_CLUSTER, listen_ip_info=f"{_HOST}:{port}"
            )
        except LLMException as error:
            raise SetupError(
                f"prefill cannot listen on port {port} of {_HOST}: {error}\n"
                "Choose another port with --port, or leave it out: the system then picks a free "
                "one."
            ) from error
        yield Listening(listening)
        yield from self._load(num_answer_tokens=0)

    def compute(self, request_id: int, prompt: Prompt) -> Iterator[HandOver]:
        """Compute this prompt as soon as there are blocks for it."""
        self._tokens[request_id] = self._model.encode(prompt)
        self._waiting.append(request_id)
        yield from self._compute_waiting()

    def release(self, request_id: int) -> Iterator[HandOver]:
        """Nobody reads this request's blocks any more: the next one may have them."""
        self._pool.release(self._handles.pop(request_id))
        yield from self._compute_waiting()

    def generate(self, request_id: int) -> Iterator[Generated]:
        """Answer this request again, all alone."""
        tokens = self._model.generate(self._tokens[request_id], self._settings.max_new_tokens)
        yield Generated(request_id, tuple(tokens))

    def _compute_waiting(self) -> Iterator[HandOver]:
        while self._waiting and self._has_room_for(self._waiting[0]):
            yield self._compute(self._waiting.popleft())

    def _has_room_for(self, request_id: int) -> bool:
        num_blocks = self._pool.shape.num_blocks(len(self._tokens[request_id]))
        if num_blocks > self._pool.num_blocks:
            raise CommandError(
                f"prompt {request_id} needs {num_blocks} blocks, and prefill has "
                f"{self._pool.num_blocks}: this model's tokenizer makes too many tokens of it."
            )
        return num_blocks <= self._pool.num_free_blocks

    def _compute(self, request_id: int) -> HandOver:
        cache = self._pool.new_cache()
        first_token = self._model.next_token(self._tokens[request_id], cache)
        handle = self._handles[request_id] = self._pool.publish(cache)
        return HandOver(
            request_id, handle.num_tokens, len(handle.blocks), handle.to_json(), first_token
        )


class Decode(Worker):
    """Fetches a request's blocks, and goes on where prefill stopped.

    It never sees a prompt: what it knows of a request is a `HandOver`, and the blocks. It has the
    answers under way, and the requests that wait for blocks.
    """

    name = "decode"
    _seed = 2

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._answers: list[Answer] = []
        self._waiting: deque[HandOver] = deque()
        self._prefill_port: int | None = None

    def load(self) -> Iterator[Loading]:
        """Load the model."""
        self._start_cluster(LLMRole.DECODER, _DECODE_CLUSTER)
        yield from self._load(self._settings.max_new_tokens)

    def link(self, port: int) -> Iterator[Linked]:
        """Link to the prefill that listens there. Raises CommandError when it fails."""
        status = self._node.link(port, _PREFILL_CLUSTER, _TIMEOUT_MS)
        if status is not LLMStatusCode.LLM_SUCCESS:
            raise CommandError(self._link_failure(status, port))
        self._prefill_port = port
        [link] = self._node.datadist.links()
        yield Linked(link.path, link.path_reason)

    def go_on(self, requests: Sequence[HandOver]) -> Iterator[Pulled | Token]:
        """Fetch those requests that there are blocks for, and add a token to every answer."""
        self._waiting.extend(requests)
        yield from self._fetch_waiting()
        for answer in tuple(self._answers):
            yield self._add(answer, self._model.next_token(answer.tokens[-1:], answer.cache))

    def close(self) -> Iterable[Event]:
        """End the link, and let go of all memory."""
        if self._prefill_port is not None:
            self._node.unlink(self._prefill_port, _PREFILL_CLUSTER, _TIMEOUT_MS)
        return super().close()

    def _fetch_waiting(self) -> Iterator[Pulled | Token]:
        """Only with blocks for the whole answer: it never stops in its middle."""
        while self._waiting:
            request = self._waiting[0]
            most_tokens = request.num_tokens + self._settings.max_new_tokens
            if self._pool.shape.num_blocks(most_tokens) > self._pool.num_free_blocks:
                return
            self._waiting.popleft()
            pulled, cache = self._fetch(request)
            yield pulled
            cache.reserve(most_tokens)
            answer = Answer(request.request_id, cache)
            self._answers.append(answer)
            yield self._add(answer, request.first_token)

    def _fetch(self, request: HandOver) -> tuple[Pulled, PagedCache]:
        from llm_datadist.integrations.transformers import KVHandle

        handle = KVHandle.from_json(request.handle)
        begin_s = time.perf_counter()
        cache = self._pool.fetch(handle)
        duration_s = time.perf_counter() - begin_s
        nbytes = len(handle.blocks) * handle.shape.block_nbytes
        return Pulled(request.request_id, nbytes, duration_s), cache

    def _add(self, answer: Answer, token: int) -> Token:
        answer.tokens.append(token)
        piece = answer.grow(self._model.decode(answer.tokens))
        is_last = (
            token in self._model.end_tokens or len(answer.tokens) == self._settings.max_new_tokens
        )
        if is_last:
            self._answers.remove(answer)
            answer.cache.release()
        return Token(answer.request_id, token, piece, is_last)

    def _link_failure(self, status: LLMStatusCode, port: int) -> str:
        text = f"decode cannot link to prefill at {_HOST}:{port}: {status.name}."
        if self._settings.path is LinkPath.CMA:
            text += (
                " --path cma reads the other process's memory, which this system may not permit: "
                "try --path auto, which falls back to TCP and says why."
            )
        return text


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


class LoggedErrors(logging.Handler):
    """Keeps what the library logs as an error, instead of a print amid the answers."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._messages: list[str] = []
        logging.getLogger(LOGGER_NAME).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    def added_to(self, message: str) -> str:
        """`message`, and below it what was logged."""
        return "\n".join([message, *self._messages])
