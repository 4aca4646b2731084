"""The decode side: which blocks are read from whom."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING

from llm_datadist import BlocksCacheKey
from llm_datadist.integrations.vllm.handover import Handover, handover_of
from llm_datadist.integrations.vllm.request import (
    digest_of,
    do_no_remote_prefill,
    wants_remote_prefill,
)
from llm_datadist.integrations.vllm.step import Pull

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from concurrent.futures import Future

    from llm_datadist.cache import Cache
    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.integrations.vllm.board import Board
    from llm_datadist.integrations.vllm.producers import Producers
    from llm_datadist.integrations.vllm.request import Request
    from llm_datadist.integrations.vllm.step import Step

logger = logging.getLogger(__name__)

#: how often a waiting request is mentioned to its producer in the time of a lease
_BEATS_PER_LEASE = 6


class ConsumerScheduler:
    """In the scheduler: turns the blocks that a request has got into pulls."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._next_beat = 0.0
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
            source = handover_of(request.kv_transfer_params or {})
            num_tokens = source.remote_num_tokens
            is_same = digest_of(request, num_tokens) == source.remote_digest
            if num_tokens > request.num_prompt_tokens or not is_same:
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
        now = time.monotonic()
        if now >= self._next_beat:
            served = {pull.request_id for pull in step.pulls}
            waiting = [source for each, source in self._sources.items() if each not in served]
            step.renewals = waiting
            lease_s = min((source.remote_lease_s for source in waiting), default=0.0)
            self._next_beat = now + lease_s / _BEATS_PER_LEASE

    def _release(self, request_id: str) -> None:
        """Lets go, unless another of the `n` answers to the same prompt still waits."""
        source = self._sources.pop(request_id, None)
        if source and source not in self._sources.values():
            self._releases.append(source)


class ConsumerWorker:
    """In a worker: reads blocks in threads of its own, while the engine goes on."""

    def __init__(
        self,
        manager: CacheManager,
        caches: Mapping[int, Cache],
        board: Board,
        producers: Producers,
    ) -> None:
        self._manager, self._caches, self._board = manager, caches, board
        self._producers = producers
        self._received: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._failed_blocks: set[int] = set()
        self._pulls: list[tuple[float, int]] = []
        self._num_failed = 0

    def apply(self, step: Step) -> None:
        """Starts what the scheduler says."""
        for source in step.expected:
            self._producers.reach(source)
        now = time.monotonic()
        for pull in step.pulls:
            self._producers.when_linked(pull.source, self._pull, (pull, now))
        for source in step.releases:
            self._producers.when_linked(source, self._release, source)
        for engine in {source.remote_engine_id for source in step.renewals}:
            some = [each for each in step.renewals if each.remote_engine_id == engine]
            self._producers.when_linked(some[0], self._renew, some)

    def take_received(self) -> set[str]:
        """Requests whose pull is over since the last call; failed ones are among them."""
        received = set()
        while not self._received.empty():
            received.add(self._received.get())
        return received

    def take_failed_blocks(self) -> set[int]:
        """Blocks that were to be read since the last call and hold nothing of use."""
        with self._lock:
            failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_counts(self) -> tuple[list[tuple[float, int]], int]:
        """Of the pulls since the last call: seconds and blocks of each, and how many failed."""
        with self._lock:
            pulls, self._pulls = self._pulls, []
            num_failed, self._num_failed = self._num_failed, 0
        return pulls, num_failed

    def _pull(self, link: Future[int], pull_since: tuple[Pull, float]) -> None:
        pull, begun = pull_since
        try:
            cluster_id = link.result()
            for model_id, cache in self._caches.items():
                self._manager.pull_blocks(
                    BlocksCacheKey(cluster_id, model_id),
                    cache,
                    pull.src_blocks,
                    pull.dst_blocks,
                    tensor_num_per_layer=1,
                )
            if not self._board.holds(cluster_id, pull.source.remote_lease):
                raise LookupError("the producer has freed the blocks: the lease had ended")
        except Exception as error:  # whatever it is, the request must not wait
            self._fail(pull, error)
            return
        with self._lock:
            self._pulls.append((time.monotonic() - begun, len(pull.dst_blocks)))
        self._received.put(pull.request_id)

    def _fail(self, pull: Pull, error: Exception) -> None:
        source = pull.source
        logger.error(
            "%s: its KV cannot be read from %s at %s:%d: %s",
            pull.request_id,
            source.remote_engine_id,
            source.remote_host,
            source.remote_port,
            error,
        )
        with self._lock:
            self._failed_blocks.update(pull.dst_blocks)
            self._num_failed += 1
        self._received.put(pull.request_id)

    def _release(self, link: Future[int], source: Handover) -> None:
        try:
            self._board.release(link.result(), [source.remote_lease])
        except Exception as error:  # its lease will end without us
            logger.info("%s could not be told: %s", source.remote_engine_id, error)

    def _renew(self, link: Future[int], sources: list[Handover]) -> None:
        try:
            self._board.renew(link.result(), [source.remote_lease for source in sources])
        except Exception as error:  # the pull will say so, if it matters
            logger.info("%s could not be told: %s", sources[0].remote_engine_id, error)
