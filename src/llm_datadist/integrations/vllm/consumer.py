"""The decode side: which blocks are read from whom."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist import BlocksCacheKey, LLMException, LLMStatusCode
from llm_datadist.integrations.vllm.handover import Handover, handover_of
from llm_datadist.integrations.vllm.leases import Leases
from llm_datadist.integrations.vllm.request import (
    digest_of,
    do_no_remote_prefill,
    wants_remote_prefill,
)
from llm_datadist.integrations.vllm.step import Pull

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from llm_datadist.cache import Cache
    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.integrations.vllm.board import Board
    from llm_datadist.integrations.vllm.producers import Producer, Producers
    from llm_datadist.integrations.vllm.request import Request
    from llm_datadist.integrations.vllm.step import Step

logger = logging.getLogger(__name__)

#: of a pull: what another link would not change
_FINAL = (LLMStatusCode.LLM_TIMEOUT, LLMStatusCode.LLM_PARAM_INVALID)


class ConsumerScheduler:
    """In the scheduler: turns the blocks that a request has got into pulls."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        #: of the requests whose blocks are still kept for us
        self._sources: dict[str, Handover] = {}
        self._expected: list[Handover] = []
        self._pulls: list[Pull] = []
        self._releases: list[Handover] = []

    def arrived(self, request: Request) -> None:
        """A new request. One that was not handed over as it is here is computed, and it is said."""
        if not wants_remote_prefill(request):
            return
        try:
            source = handover_of(request.kv_transfer_params)
            num_tokens = source.remote_num_tokens
            has_tokens = num_tokens <= len(request.prompt_token_ids or ())
            if not has_tokens or digest_of(request, num_tokens) != source.remote_digest:
                raise ValueError("its prompt was read as other tokens there")
        except ValueError as error:
            logger.warning("%s is computed here: %s", request.request_id, error)
            return
        self._sources[request.request_id] = source
        self._expected.append(source)

    def num_matched_tokens(self, request: Request, num_computed_tokens: int) -> int:
        """How many tokens of the prompt can be read, beyond those that are here."""
        source = self._sources.get(request.request_id)
        if source is None or not wants_remote_prefill(request):
            return 0
        return max(0, source.remote_num_tokens - num_computed_tokens)

    def allocated(self, request: Request, block_ids: list[int], num_external_tokens: int) -> None:
        """The request has got its blocks, of which the last before its end are to be read."""
        source = self._sources.get(request.request_id)
        if source is None or not wants_remote_prefill(request):
            return
        do_no_remote_prefill(request)  # once: what cannot be read is computed
        if not num_external_tokens:
            self._release(request.request_id)
            return
        end = source.remote_num_tokens
        blocks = slice((end - num_external_tokens) // self._block_size, -(-end // self._block_size))
        self._pulls.append(
            Pull(request.request_id, source, source.block_ids[blocks], block_ids[blocks])
        )

    def finished(self, request: Request) -> None:
        """A request that ends before it got blocks lets go of those that are kept for it."""
        if wants_remote_prefill(request):
            self._release(request.request_id)

    def received(self, request_ids: Iterable[str]) -> None:
        """These have been read, or could not be, by all workers."""
        for request_id in request_ids:
            self._release(request_id)

    def fill(self, step: Step) -> None:
        """Adds what has come up since the last step."""
        step.expected, step.pulls, step.releases = self._expected, self._pulls, self._releases
        self._expected, self._pulls, self._releases = [], [], []

    def _release(self, request_id: str) -> None:
        """Lets go, unless another of the `n` answers to the same prompt still waits."""
        source = self._sources.pop(request_id, None)
        if source and source not in self._sources.values():
            self._releases.append(source)


class ConsumerWorker:
    """In a worker: reads blocks in threads of its own, while the engine goes on.

    Each pull that `apply` is given ends once, received or failed, whatever becomes of its producer,
    of our threads, and of us: who takes it from the line reports it.
    """

    def __init__(
        self,
        manager: CacheManager,
        caches: Mapping[int, Cache],
        board: Board,
        producers: Producers,
    ) -> None:
        self._manager, self._caches, self._board = manager, caches, board
        self._producers = producers
        self._leases = Leases(board, producers)
        self._lock = threading.Lock()
        self._ended: set[str] = set()
        self._failed_blocks: set[int] = set()
        #: of what `take_received` has told of
        self._told_failed_blocks: set[int] = set()
        self._pulls: list[tuple[float, int]] = []
        self._num_failed = 0

    def apply(self, step: Step) -> None:
        """Starts what the scheduler says."""
        pulled = [pull.source for pull in step.pulls]
        for source in step.expected:
            with suppress(ConnectionError):  # its pull will say so
                self._producers.reach(source)
            self._leases.expect(source, is_read_now=source in pulled)
        for pull in step.pulls:
            self._begin(pull)
        for source in step.releases:
            self._leases.release(source)

    def take_received(self) -> set[str]:
        """Requests whose pull is over since the last call; failed ones are among them."""
        with self._lock:
            ended, self._ended = self._ended, set()
            self._told_failed_blocks |= self._failed_blocks
            self._failed_blocks = set()
        return ended

    def take_failed_blocks(self) -> set[int]:
        """Blocks that hold nothing of use, of the requests that `take_received` has told of."""
        with self._lock:
            failed, self._told_failed_blocks = self._told_failed_blocks, set()
        return failed

    def take_counts(self) -> tuple[list[tuple[float, int]], int]:
        """Of the pulls since the last call: seconds and blocks of each, and how many failed."""
        with self._lock:
            pulls, self._pulls = self._pulls, []
            num_failed, self._num_failed = self._num_failed, 0
        return pulls, num_failed

    def close(self) -> None:
        """Waits for the pulls that run; those that wait for their turn fail."""
        self._leases.close()
        self._producers.close()

    def _begin(self, pull: Pull) -> None:
        try:
            producer = self._producers.reach(pull.source)
            producer.pulls.put(partial(self._pull, producer, pull, time.monotonic()))
        except Exception as error:  # whatever it is, the request must not wait
            self._failed(pull, error)

    def _pull(self, producer: Producer, pull: Pull, asked: float) -> None:
        try:
            producer.check_patience(asked)
            for is_last in (False, False, True):
                try:
                    self._read(producer, pull)
                    break
                except LLMException as error:
                    if is_last or error.status_code in _FINAL:
                        raise
                # another's hand-over may have led to this producer by another of its addresses,
                # and its link there have ended ours
                producer = self._producers.reach(pull.source)
        except BaseException as error:  # as above
            self._failed(pull, error)
            return
        with self._lock:
            self._pulls.append((time.monotonic() - asked, len(pull.dst_blocks)))
            self._ended.add(pull.request_id)

    def _read(self, producer: Producer, pull: Pull) -> None:
        cluster_id = self._producers.cluster_of(producer, pull.source)
        begun = time.monotonic()
        try:
            self._read_from(cluster_id, pull)
        except LLMException as error:
            if error.status_code is LLMStatusCode.LLM_TIMEOUT:
                producer.timed_out(begun)
            raise
        producer.heard()

    def _read_from(self, cluster_id: int, pull: Pull) -> None:
        """Reads the blocks, if the lease and the hand-over are what the producer gave."""
        lease = pull.source.remote_lease
        key = self._board.key_of(cluster_id, lease)
        if key is None:
            raise _ended_lease()
        if not pull.source.is_proved(key):
            raise LookupError("the hand-over is not what the producer said")
        for model_id, cache in self._caches.items():
            self._manager.pull_blocks(
                BlocksCacheKey(cluster_id, model_id),
                cache,
                pull.src_blocks,
                pull.dst_blocks,
                tensor_num_per_layer=1,
            )
        if self._board.key_of(cluster_id, lease) != key:
            raise _ended_lease()

    def _failed(self, pull: Pull, error: BaseException) -> None:
        with self._lock:
            self._ended.add(pull.request_id)
            self._failed_blocks.update(pull.dst_blocks)
            self._num_failed += 1
        source = pull.source
        logger.error(
            "%s: its KV cannot be read from %s at %s:%d: %s",
            pull.request_id,
            source.remote_engine_id,
            source.remote_host,
            source.remote_port,
            error,
        )


def _ended_lease() -> LookupError:
    return LookupError("the producer has freed the blocks: the lease had ended")
