"""The decode side in a worker: reads blocks, while the engine goes on."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.integrations.vllm.handover import Handover, Named
from llm_datadist.integrations.vllm.leases import Leases
from llm_datadist.integrations.vllm.memory import Part
from llm_datadist.integrations.vllm.orders import Orders
from llm_datadist.integrations.vllm.outcomes import Outcomes
from llm_datadist.integrations.vllm.overlap import Overlap

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.integrations.vllm.board import Board
    from llm_datadist.integrations.vllm.handover import Lease
    from llm_datadist.integrations.vllm.memory import Memory, Peer
    from llm_datadist.integrations.vllm.producers import Producer, Producers
    from llm_datadist.integrations.vllm.ranks import Origin, SourceT
    from llm_datadist.integrations.vllm.records import RemoteRecords
    from llm_datadist.integrations.vllm.step import Pull, Step


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
        records: RemoteRecords,
        pull_timeout_s: float,
        overlap_timeout_s: float,
    ) -> None:
        self._memory, self._board = memory, board
        self._producers, self._pull_timeout_s = producers, pull_timeout_s
        self._leases = Leases(board, producers)
        self._overlap = Overlap(memory, records, self._leases, producers, overlap_timeout_s)
        self.outcomes = Outcomes()
        self._orders = Orders(self._begin_all)

    def apply(self, step: Step) -> None:
        """Starts what the scheduler says. Raises nothing: what cannot be done is a failed load."""
        if self._orders.is_inherited:
            for pull in step.pulls:
                self.outcomes.failed(pull, ChildProcessError("this process is the engine's child"))
            return
        if step.expected or step.pulls or step.releases or step.cancels:
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
            if isinstance(source, Handover):
                for origin in self._workers(source):
                    self._leases.expect(origin, is_read_now=source in pulled)
        for pull in step.pulls:
            self._begin(pull)
        for request_id in step.cancels:
            self._overlap.end(request_id)
        for source in step.releases:
            self._release(source)

    def _release(self, source: Handover | Named) -> None:
        given = self._overlap.take_found(source) if isinstance(source, Named) else source
        for origin in self._workers(given) if given else ():
            self._leases.release(origin)

    def _workers(self, source: SourceT) -> list[Origin[SourceT]]:
        """None of a hand-over that cannot be read: its pull will say so."""
        with suppress(LookupError):
            return self._producers.workers(source)
        return []

    def _begin(self, pull: Pull) -> None:
        try:
            # now: those who wait for their turn behind a link that fails need not try another
            producers = self._reached(pull)
            # a pull is done by the threads of one of the workers that it reads from
            crew = producers[0].pulls
            if isinstance(pull.source, Named):
                crew = producers[0].overlapped
                self._overlap.begin(pull.request_id)
            crew.put(partial(self._pull, producers, pull, time.monotonic()))
        except Exception as error:  # whatever it is, the request must not wait
            self._overlap.end(pull.request_id)
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
        finally:
            self._overlap.end(pull.request_id)

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
        source = pull.source
        if isinstance(source, Named):
            records = self._overlap.find(peers, pull, source)
            with self._leased(peers, records[0].lease):
                return self._overlap.read(peers, pull, source, records)
        blocks, num_tokens = source.remote_block_ids, source.remote_num_tokens
        with self._leased(peers, source.remote_lease) as keys:
            if not all(map(source.is_proved, keys)):
                raise LookupError("the hand-over is not what the producer said")
            part = Part(blocks, pull.dst_blocks, num_tokens, pull.num_computed_tokens)
            return self._memory.read(peers, part)

    @contextmanager
    def _leased(self, peers: Sequence[Peer], lease: Lease) -> Iterator[list[bytes]]:
        """With the keys of the lease. Raises LookupError behind it if it has ended by then."""
        keys = [self._board.key_of(peer.cluster_id, lease) for peer in peers]
        if None in keys:
            raise _ended_lease()
        yield [key for key in keys if key]
        if keys != [self._board.key_of(peer.cluster_id, lease) for peer in peers]:
            raise _ended_lease()


def _ended_lease() -> LookupError:
    return LookupError("the producer has freed the blocks: the lease had ended")
