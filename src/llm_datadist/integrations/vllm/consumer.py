"""The decode side: which blocks are read from whom."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.integrations.vllm.handover import Handover, handover_of
from llm_datadist.integrations.vllm.leases import Leases
from llm_datadist.integrations.vllm.orders import Orders
from llm_datadist.integrations.vllm.outcomes import Outcomes
from llm_datadist.integrations.vllm.printable import printable, shown_id
from llm_datadist.integrations.vllm.request import digest_of, wants_remote_prefill
from llm_datadist.integrations.vllm.step import Pull

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llm_datadist.integrations.vllm.board import Board
    from llm_datadist.integrations.vllm.memory import Memory, Peer
    from llm_datadist.integrations.vllm.producers import Producer, Producers
    from llm_datadist.integrations.vllm.ranks import Origin
    from llm_datadist.integrations.vllm.request import Request
    from llm_datadist.integrations.vllm.step import Step

logger = logging.getLogger(__name__)


class ConsumerScheduler:
    """In the scheduler: turns the blocks that a request has got into pulls.

    By a directory it takes hand-overs that name a start of an engine, and else those that name an
    address: so with one, nobody who sends requests says where is dialled.
    """

    def __init__(self, *, has_directory: bool = False) -> None:
        self._has_directory = has_directory
        #: what is kept for requests that have got no blocks yet, and for those that read it now.
        #: Not kept in their parameters, which several requests may share
        self._waiting: dict[str, Handover] = {}
        self._reading: dict[str, Handover] = {}
        self._expected: list[Handover] = []
        self._pulls: list[Pull] = []
        self._releases: list[Handover] = []

    def arrived(self, request: Request) -> None:
        """A new request. One that was not handed over as it is here is computed, and it is said.

        One that comes under the id of another that waits replaces it.
        """
        if not wants_remote_prefill(request):
            return
        try:
            source = handover_of(request.kv_transfer_params)
            if source.is_announced and not self._has_directory:
                raise ValueError("it names no address, and no directory is set here")
            if self._has_directory and not source.is_announced:
                raise ValueError("it names an address, and the directory here says who is where")
            num_tokens = source.remote_num_tokens
            has_tokens = num_tokens <= len(request.prompt_token_ids or ())
            if not has_tokens or digest_of(request, num_tokens) != source.remote_digest:
                raise ValueError("its prompt was read as other tokens there")
        except ValueError as error:
            logger.warning(
                "%s is computed here: %s", shown_id(request.request_id), printable(error)
            )
            return
        self._let_go(self._waiting, request.request_id)
        self._waiting[request.request_id] = source
        self._expected.append(source)

    def num_matched_tokens(self, request: Request, num_computed_tokens: int) -> int:
        """How many tokens of the prompt can be read, beyond those that are here."""
        source = self._waiting.get(request.request_id)
        if source is None or request.request_id in self._reading:  # what ends would be unclear
            return 0
        return max(0, source.remote_num_tokens - num_computed_tokens)

    def allocated(
        self, request: Request, block_ids: Sequence[Sequence[int]], num_external_tokens: int
    ) -> None:
        """The request has got its blocks, by group; so many of the tokens handed over are to be
        read into them, the last ones.

        Once: what cannot be read is computed.
        """
        if not num_external_tokens:
            self._let_go(self._waiting, request.request_id)
            return
        source = self._waiting.pop(request.request_id, None)
        if source is None:
            return
        self._reading[request.request_id] = source
        num_computed = source.remote_num_tokens - num_external_tokens
        self._pulls.append(Pull(request.request_id, source, block_ids, num_computed))

    def finished(self, request: Request) -> None:
        """A request that ends before it got blocks lets go of those that are kept for it."""
        self._let_go(self._waiting, request.request_id)

    def received(self, request_ids: Iterable[str]) -> None:
        """These have been read, or could not be, by all workers."""
        for request_id in request_ids:
            self._let_go(self._reading, request_id)

    def fill(self, step: Step) -> None:
        """Adds what has come up since the last step."""
        step.expected, step.pulls, step.releases = self._expected, self._pulls, self._releases
        self._expected, self._pulls, self._releases = [], [], []

    def _let_go(self, kept: dict[str, Handover], request_id: str) -> None:
        """Of what a request has there, unless another of the `n` answers to its prompt needs it."""
        source = kept.pop(request_id, None)
        if source and not any(source in each.values() for each in (self._waiting, self._reading)):
            self._releases.append(source)


#: how long a pull may take, unless it is told
PULL_TIMEOUT_S = 10.0


class ConsumerWorker:
    """In a worker: reads blocks in threads of its own, while the engine goes on.

    Each pull that `apply` is given ends once, received or failed, whatever becomes of its producer,
    of our threads, and of us: who takes it from the line reports it.
    """

    def __init__(
        self,
        memory: Memory,
        board: Board,
        producers: Producers,
        pull_timeout_s: float = PULL_TIMEOUT_S,
    ) -> None:
        self._memory, self._board = memory, board
        self._producers, self._pull_timeout_s = producers, pull_timeout_s
        self._leases = Leases(board, producers)
        self.outcomes = Outcomes()
        self._orders = Orders(self._begin_all)

    def apply(self, step: Step) -> None:
        """Starts what the scheduler says. Raises nothing: what cannot be done is a failed load."""
        if self._orders.is_inherited:
            for pull in step.pulls:
                self.outcomes.failed(pull, ChildProcessError("this process is the engine's child"))
            return
        if step.expected or step.pulls or step.releases:
            self._orders.put(step)

    def take_received(self) -> set[str]:
        """The requests whose pulls have ended since the last call."""
        return self.outcomes.take_received()

    def close(self) -> None:
        """Waits for the pulls that run; those that wait for their turn fail."""
        if self._orders.is_inherited:
            return
        self._leases.close()
        self._producers.close()
        self._orders.close()
        self._producers.wait()

    def _begin_all(self, step: Step) -> None:
        pulled = [pull.source for pull in step.pulls]
        for source in step.expected:
            for origin in self._workers(source):
                with suppress(Exception):  # its pull will say so
                    self._producers.reach(origin)
                self._leases.expect(origin, is_read_now=source in pulled)
        for pull in step.pulls:
            self._begin(pull)
        for source in step.releases:
            for origin in self._workers(source):
                self._leases.release(origin)

    def _workers(self, source: Handover) -> list[Origin]:
        """None of a hand-over that cannot be read: its pull will say so."""
        with suppress(LookupError):
            return self._producers.workers(source)
        return []

    def _begin(self, pull: Pull) -> None:
        try:
            # now: those who wait for their turn behind a link that fails need not try another
            producers = self._reached(pull)
            # a pull is done by the threads of one of the workers that it reads from
            producers[0].pulls.put(partial(self._pull, producers, pull, time.monotonic()))
        except Exception as error:  # whatever it is, the request must not wait
            self.outcomes.failed(pull, error)

    def _pull(self, producers: Sequence[Producer], pull: Pull, asked: float) -> None:
        try:
            for producer in producers:
                producer.check_patience(asked)
            until = time.monotonic() + self._pull_timeout_s
            while (nbytes := self._read_unless_lost(producers, pull, until)) is None:
                self._producers.pause()
                producers = self._reached(pull)
        except BaseException as error:  # as above
            self.outcomes.failed(pull, error)
        else:
            self.outcomes.received(pull, time.monotonic() - asked, nbytes)

    def _reached(self, pull: Pull) -> list[Producer]:
        return [self._producers.reach(each) for each in self._producers.workers(pull.source)]

    def _read_unless_lost(
        self, producers: Sequence[Producer], pull: Pull, until: float
    ) -> int | None:
        """The bytes that were read; None if a link was lost, and there is time left."""
        for producer in producers:
            self._producers.await_link(producer)
        try:
            return self._read(producers, pull)
        except (LLMException, LookupError) as error:
            is_lost = getattr(error, "status_code", None) is LLMStatusCode.LLM_NOT_YET_LINK
            is_lost = is_lost or any(map(self._producers.is_lost, producers))
            if time.monotonic() > until or not is_lost:
                raise
            return None

    def _read(self, producers: Sequence[Producer], pull: Pull) -> int:
        begun = time.monotonic()
        try:
            nbytes = self._read_from([producer.peer for producer in producers], pull)
        except LLMException as error:
            if error.status_code is LLMStatusCode.LLM_TIMEOUT:
                for producer in producers:
                    producer.timed_out(begun)
            raise
        for producer in producers:
            producer.heard()
        return nbytes

    def _read_from(self, peers: Sequence[Peer], pull: Pull) -> int:
        """Reads the blocks, if the lease and the hand-over are what the producer gave."""
        lease = pull.source.remote_lease
        keys = [self._board.key_of(peer.cluster_id, lease) for peer in peers]
        if None in keys:
            raise _ended_lease()
        if not all(key and pull.source.is_proved(key) for key in keys):
            raise LookupError("the hand-over is not what the producer said")
        nbytes = self._memory.read(peers, pull)
        if keys != [self._board.key_of(peer.cluster_id, lease) for peer in peers]:
            raise _ended_lease()
        return nbytes


def _ended_lease() -> LookupError:
    return LookupError("the producer has freed the blocks: the lease had ended")
