"""The engines that are read from: linked when they are first heard of, and checked.

A producer is known by its address: at one address there is one link, whatever a hand-over calls the
engine that is there. Whose hand-over it is decides the cluster id that the link turned out to have.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMException,
    LLMStatusCode,
)
from llm_datadist.integrations.vllm.crew import Crew
from llm_datadist.integrations.vllm.facts import differences
from llm_datadist.integrations.vllm.handover import Handover, cluster_id_of

if TYPE_CHECKING:
    from llm_datadist import LLMDataDist

logger = logging.getLogger(__name__)

_FACTS_NBYTES = 256 * 1024
#: of each producer: one that hangs has only its own waiting
_NUM_PULLS = 4
#: a second link to who is linked ends the first one, and an engine may have several addresses
_LINK_TRIES = 3
#: addresses at which nobody answers yet; hand-overs that are made up may name any number of them
_MOST_UNLINKED = 256
_MADE = (
    LLMStatusCode.LLM_SUCCESS,
    LLMStatusCode.LLM_ALREADY_LINK,
    LLMStatusCode.LLM_NOT_YET_LINK,  # and lost at once
)


class Misfit(Exception):
    """The engine differs from ours in what must be equal. It lasts as long as the link."""


class AnotherEngine(Exception):
    """Who is at the address is not who made the hand-over."""


class Producer:
    """What is at one address: the link to it, and the threads that work for it."""

    def __init__(self) -> None:
        #: reads and writes words; the first thing that it does is to link
        self.words = Crew("kv-words", 1)
        self.pulls = Crew("kv-pull", _NUM_PULLS)
        #: the cluster id of who is there, or why there is none
        self.link: Future[int] = Future()
        self.cluster_id = 0
        #: whether it has answered a call, be it that the link was lost at once
        self.was_there = False
        self._heard_at = self._silent_at = 0.0

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
    """Links to workers of our own rank, one for each address that is read from. Thread-safe.

    `facts` must be equal at both ends. They lie in memory that the other end pulls after linking.
    """

    def __init__(
        self,
        datadist: LLMDataDist,
        model_id: int,
        rank: int,
        facts: dict[str, Any],
        link_timeout_s: float,
    ) -> None:
        self._datadist, self._model_id, self._rank = datadist, model_id, rank
        self._link_timeout_s = link_timeout_s
        text = json.dumps(facts).encode()
        self._facts: dict[str, Any] = json.loads(text)
        self._memory = np.zeros(_FACTS_NBYTES, np.uint8)
        self._memory[: len(text)] = np.frombuffer(text, np.uint8)
        datadist.cache_manager.register_blocks_cache(
            CacheDesc(1, [1, _FACTS_NBYTES], DataType.DT_UINT8),
            [self._memory.ctypes.data],
            BlocksCacheKey(datadist.cluster_id, model_id),
        )
        self._lock = threading.Lock()
        self._is_closed = False
        self._producers: dict[tuple[str, int], Producer] = {}

    def reach(self, source: Handover) -> Producer:
        """The producer of that hand-over. Begins to link to it if it is not linked.

        Raises ConnectionError when we are closed, or wait for too many already.
        """
        with self._lock:
            if self._is_closed:
                raise ConnectionError("the connector was shut down")
            producer = self._producers.get(self._address(source))
            if producer is None or self._is_lost(producer):
                self._forget_lost()
                if sum(not each.link.done() for each in self._producers.values()) >= _MOST_UNLINKED:
                    raise ConnectionError("too many producers are being linked to")
                producer = self._producers[self._address(source)] = Producer()
                self._begin_link(producer, source)
            return producer

    def reached(self, source: Handover) -> Producer | None:
        """As `reach`, but none is linked for it."""
        with self._lock:
            return self._producers.get(self._address(source))

    def reach_again(self, source: Handover) -> Producer | None:
        """As `reach`, but of what never answered there none is called again and again."""
        producer = self.reached(source)
        return self.reach(source) if producer and producer.was_there else producer

    def cluster_of(self, producer: Producer, source: Handover) -> int:
        """The cluster id of who made the hand-over; waits until it is linked and fits.

        Raises ConnectionError when it cannot be linked, Misfit that names what differs,
        AnotherEngine.
        """
        cluster_id = producer.link.result()
        if self._is_closed:
            raise ConnectionError("the connector was shut down")
        if cluster_id != cluster_id_of(source.remote_engine_id, *self._address(source)):
            self._end_if_silent(cluster_id)
            raise AnotherEngine("another engine is at its address now")
        return cluster_id

    def close(self) -> None:
        """Waits for what runs; what was to follow ends with an error."""
        with self._lock:
            self._is_closed = True
        for producer in self._producers.values():
            producer.pulls.wait()
            producer.words.wait()

    def _address(self, source: Handover) -> tuple[str, int]:
        return source.remote_host, source.remote_port + self._rank

    def _forget_lost(self) -> None:
        for address, producer in list(self._producers.items()):
            if self._is_lost(producer):
                del self._producers[address]

    def _is_lost(self, producer: Producer) -> bool:
        if not producer.link.done():
            return False
        is_linked = any(each.cluster_id == producer.cluster_id for each in self._datadist.links())
        return not is_linked or not isinstance(producer.link.exception(), Misfit | None)

    def _begin_link(self, producer: Producer, source: Handover) -> None:
        try:
            producer.words.put(partial(self._link, producer, source))
        except Exception as error:  # whatever it is, nobody must wait for the link
            producer.link.set_exception(error)

    def _link(self, producer: Producer, source: Handover) -> None:
        host, port = self._address(source)
        try:
            for tries_left in reversed(range(_LINK_TRIES)):
                producer.cluster_id = self._link_to(host, port, source)
                producer.was_there = True
                if self._fits(producer.cluster_id, is_last=not tries_left):
                    break
        except BaseException as error:  # as above
            producer.link.set_exception(error)
            engine_id = source.remote_engine_id
            logger.error("cannot read from %s at %s:%d: %s", engine_id, host, port, error)
        else:
            producer.link.set_result(producer.cluster_id)
            logger.info("linked to %s:%d", host, port)

    def _link_to(self, host: str, port: int, source: Handover) -> int:
        """Links to the address; the cluster id of who is there."""
        cluster_id = cluster_id_of(source.remote_engine_id, host, port)
        info = LLMClusterInfo()
        info.remote_cluster_id = cluster_id
        info.append_local_ip_info("0.0.0.0", 0)
        info.append_remote_ip_info(host, port)
        status, _ = self._datadist.link_clusters([info], int(self._link_timeout_s * 1000))
        if status not in _MADE:
            raise ConnectionError(f"cannot link to it: {status.name} (the log says more)")
        links = self._datadist.links()
        at_address = [link.cluster_id for link in links if link.endpoint == (host, port)]
        is_right = any(link.cluster_id == cluster_id for link in links)  # it may have called us
        return cluster_id if is_right or not at_address else at_address[0]

    def _fits(self, cluster_id: int, *, is_last: bool) -> bool:
        """Whether it is what we are; False if the link was lost at once, and can be tried again."""
        try:
            theirs = self._read_facts(cluster_id)
        except LLMException as error:
            if error.status_code is LLMStatusCode.LLM_TIMEOUT or is_last:
                raise ConnectionError(f"it does not say what it is: {error}") from error
            return False
        if different := differences(self._facts, theirs):
            raise Misfit(f"it does not fit: {'; '.join(different)}")
        return True

    def _read_facts(self, cluster_id: int) -> dict[str, Any]:
        memory = np.zeros(_FACTS_NBYTES, np.uint8)  # of its own: a peer may hang
        manager = self._datadist.cache_manager
        desc = CacheDesc(1, [1, _FACTS_NBYTES], DataType.DT_UINT8)
        cache = manager.register_blocks_cache(desc, [memory.ctypes.data])
        try:
            key = BlocksCacheKey(cluster_id, self._model_id)
            manager.pull_blocks(key, cache, [0], [0], tensor_num_per_layer=1)
        finally:
            manager.unregister_cache(cache.cache_id)
        facts: dict[str, Any] = json.loads(memory.tobytes().rstrip(b"\0"))
        return facts

    def _end_if_silent(self, cluster_id: int) -> None:
        """Its successor may be at the address, while nobody has noticed yet that it is gone."""
        try:
            self._read_facts(cluster_id)
        except LLMException:
            info = LLMClusterInfo()
            info.remote_cluster_id = cluster_id
            self._datadist.unlink_clusters([info], force=True)
