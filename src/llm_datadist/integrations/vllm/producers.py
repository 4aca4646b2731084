"""The engines that are read from: linked when they are first heard of, and checked."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMException,
    LLMStatusCode,
)
from llm_datadist.integrations.vllm.facts import differences
from llm_datadist.integrations.vllm.handover import Handover, cluster_id_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist import LLMDataDist

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FACTS_NBYTES = 256 * 1024
#: of each producer: one that hangs has only its own waiting
_NUM_THREADS = 4


class Misfit(Exception):
    """The engine differs from ours in what must be equal. It lasts as long as the link."""


class _Producer:
    def __init__(self, link: Callable[[Handover], int], source: Handover) -> None:
        self.threads = ThreadPoolExecutor(_NUM_THREADS, "kv-producer")
        #: the cluster id of its worker, or why there is none
        self.link = self.threads.submit(link, source)


class Producers:
    """Links to workers of our own rank, one for each engine that is read from. Thread-safe.

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
        # the first block is ours, the second takes a peer's
        self._memory = np.zeros((2, _FACTS_NBYTES), np.uint8)
        self._memory[0, : len(text)] = np.frombuffer(text, np.uint8)
        self._cache = datadist.cache_manager.register_blocks_cache(
            CacheDesc(1, [2, _FACTS_NBYTES], DataType.DT_UINT8),
            [self._memory.ctypes.data],
            BlocksCacheKey(datadist.cluster_id, model_id),
        )
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._producers: dict[str, _Producer] = {}

    def reach(self, source: Handover) -> None:
        """Begins to link to that engine, if it is not linked."""
        self._producer(source)

    def when_linked(self, source: Handover, do: Callable[[Future[int], T], None], what: T) -> None:
        """Does it in a thread, with the worker's cluster id, as soon as that is linked and fits.

        The future's error says why it is not: ConnectionError, or Misfit that names what differs.
        """
        producer = self._producer(source)

        def go_on(link: Future[int]) -> None:
            with suppress(RuntimeError):  # closed meanwhile
                producer.threads.submit(do, link, what)

        producer.link.add_done_callback(go_on)

    def close(self) -> None:
        """Waits for what runs; what was to follow does not begin."""
        with self._lock:
            for producer in self._producers.values():
                producer.threads.shutdown(cancel_futures=True)

    def _producer(self, source: Handover) -> _Producer:
        engine_id = source.remote_engine_id
        with self._lock:
            producer = self._producers.get(engine_id)
            if producer is None or self._is_lost(engine_id, producer.link):
                self._forget_lost()
                producer = self._producers[engine_id] = _Producer(self._link, source)
            return producer

    def _forget_lost(self) -> None:
        for engine_id, producer in list(self._producers.items()):
            if self._is_lost(engine_id, producer.link):
                producer.threads.shutdown(wait=False)
                del self._producers[engine_id]

    def _is_lost(self, engine_id: str, link: Future[int]) -> bool:
        if not link.done():
            return False
        cluster_id = cluster_id_of(engine_id, self._rank)
        is_linked = any(each.cluster_id == cluster_id for each in self._datadist.links())
        return not is_linked or not isinstance(link.exception(), Misfit | None)

    def _link(self, source: Handover) -> int:
        where = f"{source.remote_engine_id} at {source.remote_host}:{source.remote_port}"
        try:
            cluster_id = self._link_to(source)
        except Exception as error:
            logger.error("cannot read from %s: %s", where, error)
            raise
        logger.info("linked to %s", where)
        return cluster_id

    def _link_to(self, source: Handover) -> int:
        cluster_id = cluster_id_of(source.remote_engine_id, self._rank)
        info = LLMClusterInfo()
        info.remote_cluster_id = cluster_id
        info.append_local_ip_info("0.0.0.0", 0)
        info.append_remote_ip_info(source.remote_host, source.remote_port + self._rank)
        status, _ = self._datadist.link_clusters([info], int(self._link_timeout_s * 1000))
        if status not in (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK):
            raise ConnectionError(f"cannot link to it: {status.name} (the log says more)")
        if different := differences(self._facts, self._read_facts(cluster_id)):
            raise Misfit(f"it does not fit: {'; '.join(different)}")
        return cluster_id

    def _read_facts(self, cluster_id: int) -> dict[str, Any]:
        with self._reading:
            try:
                self._datadist.cache_manager.pull_blocks(
                    BlocksCacheKey(cluster_id, self._model_id),
                    self._cache,
                    [0],
                    [1],
                    tensor_num_per_layer=1,
                )
            except LLMException as error:
                raise ConnectionError(f"it does not say what it is: {error}") from error
            facts: dict[str, Any] = json.loads(self._memory[1].tobytes().rstrip(b"\0"))
        return facts
