"""The engines that are read from: linked when they are first heard of.

A producer is known by the cluster id that its engine has if a hand-over is right about who it is
and where, or which start. So what is made up about that has a producer of its own, which turns out
to be none; no other waits for it, nor is anything of its ended.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent import futures
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from llm_datadist.integrations.vllm.crew import Crew
from llm_datadist.integrations.vllm.linking import PAUSE_S, Linking, Misfit
from llm_datadist.integrations.vllm.memory import Peer
from llm_datadist.integrations.vllm.printable import printable
from llm_datadist.integrations.vllm.ranks import MOST_PARTNERS, Origin, SourceT, partners

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist import LLMDataDist
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.integrations.vllm.handover import Source
    from llm_datadist.integrations.vllm.linking import Linked
    from llm_datadist.integrations.vllm.shapes import Shape
    from llm_datadist.link_security import LinkSecurity

logger = logging.getLogger(__name__)

#: of each producer: one that hangs has only its own waiting
_NUM_PULLS = 4
#: of those that wait for the producer to compute, most of the time
_NUM_OVERLAPPED = 64
#: producers that have not answered yet; hand-overs that are made up may name any number of them
_MOST_UNLINKED = 256


class Producer:
    """One worker of one engine: the link to it, and the threads that work for it."""

    def __init__(self, cluster_id: int, patience_s: float) -> None:
        self.cluster_id = cluster_id
        #: reads and writes words; the first thing that it does is to link
        self.words = Crew("kv-words", 1)
        self.pulls = Crew("kv-pull", _NUM_PULLS)
        #: the same of prompts that the producer has not computed yet
        self.overlapped = Crew("kv-overlap", _NUM_OVERLAPPED)
        #: where it was called, or why it is not linked
        self.link: futures.Future[Linked] = futures.Future()
        self._until = time.monotonic() + patience_s
        self._heard_at = self._silent_at = 0.0

    def await_link(self) -> None:
        """Returns when it is linked and fits. Raises what `Linking.link` does, TimeoutError."""
        try:
            self.link.result(max(0.0, self._until - time.monotonic()))
        except futures.TimeoutError:
            if self.link.done():
                raise
            # a name server has no time-out of ours
            raise TimeoutError("it could not be linked in time") from None

    @property
    def peer(self) -> Peer:
        """Whom its memory is read of, once it is linked. Raises as `await_link`."""
        return Peer(self.cluster_id, self.link.result(0).shape)

    def heard(self) -> None:
        """It has answered."""
        self._heard_at = time.monotonic()

    def timed_out(self, begun: float) -> None:
        """It has not answered what was begun then."""
        if self._heard_at < begun:
            self._silent_at = time.monotonic()

    def check_patience(self, asked: float) -> None:
        """Raises TimeoutError if it was silent since that, for as long as a pull may take.

        So those that wait for their turn need not have it one after the other to learn of that.
        """
        if asked < self._silent_at:
            raise TimeoutError("it did not answer in time")


class Producers:
    """The workers that are read from, of all engines. Thread-safe."""

    def __init__(
        self,
        datadist: LLMDataDist,
        model_id: int,
        rank: int,
        facts: dict[str, Any],
        shape: Shape,
        link_timeout_s: float,
        patience_s: float | None = None,
        security: LinkSecurity | None = None,
        locate: Callable[[Origin[Source]], Endpoint] | None = None,
    ) -> None:
        """`patience_s`: how long is waited for a link, and for all who ask about it before.

        `locate` says where a worker is dialled, if its source does not; it may take its time.
        """
        self._linking = Linking(datadist, model_id, facts, shape, security, link_timeout_s)
        self._rank, self._tp_size = rank, shape.tp_size
        self._locate = locate or attrgetter("endpoint")
        self._patience_s = link_timeout_s if patience_s is None else patience_s
        self._lock = threading.Lock()
        self._producers: dict[int, Producer] = {}

    def workers(self, source: SourceT) -> list[Origin[SourceT]]:
        """Of the engine that made a hand-over, the workers that a worker like us reads from.

        Raises LookupError if these are more than can be.
        """
        stages = range(0, source.pp_size * source.tp_size, source.tp_size)
        ranks = partners(self._rank, self._tp_size, source.tp_size)
        if len(stages) * len(ranks) > MOST_PARTNERS:
            raise LookupError(
                f"the hand-over has {len(stages) * len(ranks)} workers for one of ours"
            )
        return [Origin(source, stage + rank) for stage in stages for rank in ranks]

    def reach(self, origin: Origin[Source]) -> Producer:
        """That worker. Begins to link to it if it is not linked.

        Raises ConnectionError when we are closed, or wait for too many already; LookupError as
        `Source.address`.
        """
        cluster_id = origin.cluster_id
        with self._lock:
            self._linking.check_open()
            producer = self._producers.get(cluster_id)
            if producer is None or self.is_lost(producer):
                self._forget_lost()
                if sum(not each.link.done() for each in self._producers.values()) >= _MOST_UNLINKED:
                    raise ConnectionError("too many producers are being linked to")
                producer = self._producers[cluster_id] = Producer(cluster_id, self._patience_s)
                self._begin_link(producer, origin)
            return producer

    def pause(self, seconds: float = PAUSE_S) -> None:
        """A moment, before what was lost is reached anew. Raises ConnectionError as `reach`."""
        self._linking.pause(seconds)

    def reached(self, origin: Origin[Source]) -> Producer | None:
        """As `reach`, but none is linked for it. Raises nothing."""
        with self._lock, suppress(LookupError):
            return self._producers.get(origin.cluster_id)
        return None

    def await_link(self, producer: Producer) -> None:
        """As `Producer.await_link`. Raises ConnectionError when we are closed."""
        producer.await_link()
        self._linking.check_open()

    def is_lost(self, producer: Producer) -> bool:
        """Whether there is no link to it any more, or was none when it was tried.

        Nor is there one when somebody whom we called elsewhere says that it is this engine: words
        and blocks would come from there.
        """
        if not producer.link.done():
            return False
        error = producer.link.exception()
        if not isinstance(error, Misfit | None):
            return True
        is_linked, endpoint = self._linking.in_use(producer.cluster_id)
        if not is_linked or error or endpoint in (None, producer.link.result().endpoint):
            return not is_linked
        logger.warning(
            "%s is linked anew: who is at %s said that it is the same engine",
            producer.link.result().endpoint, endpoint,
        )  # fmt: skip
        return True

    def close(self) -> None:
        """What follows ends with an error."""
        with self._lock:
            self._linking.close()

    def wait(self) -> None:
        """Returns when nothing is read any more. A name server is not waited for."""
        until = time.monotonic() + self._patience_s
        for producer in self._producers.values():
            producer.pulls.wait()
            producer.overlapped.wait()
            producer.words.wait(max(0.0, until - time.monotonic()))

    def _forget_lost(self) -> None:
        for cluster_id, producer in list(self._producers.items()):
            if self.is_lost(producer):
                del self._producers[cluster_id]

    def _begin_link(self, producer: Producer, origin: Origin[Source]) -> None:
        try:
            producer.words.put(partial(self._link, producer, origin))
        except Exception as error:  # whatever it is, nobody must wait for the link
            producer.link.set_exception(error)

    def _link(self, producer: Producer, origin: Origin[Source]) -> None:
        who = origin.source.producer
        try:
            self._linking.check_other(producer.cluster_id)
            endpoint = self._locate(origin)
            who = f"{origin.source.remote_engine_id} at {endpoint}"
            linked = self._linking.link(producer.cluster_id, *endpoint)
        except BaseException as error:  # as above
            producer.link.set_exception(error)
            logger.error("cannot read from %s: %s", who, printable(error))
        else:
            producer.link.set_result(linked)
            logger.info("linked to %s", endpoint)
