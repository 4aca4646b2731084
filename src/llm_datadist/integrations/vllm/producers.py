"""The engines that are read from: linked when they are first heard of, and checked."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
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
from llm_datadist.integrations.vllm.facts import differences
from llm_datadist.integrations.vllm.handover import Handover, cluster_id_of

if TYPE_CHECKING:
    from llm_datadist import LLMDataDist

logger = logging.getLogger(__name__)

_FACTS_NBYTES = 256 * 1024
_NUM_LINK_THREADS = 4


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
        self._links: dict[str, Future[int]] = {}
        self._threads = ThreadPoolExecutor(_NUM_LINK_THREADS, "kv-link")

    def reach(self, source: Handover) -> Future[int]:
        """The cluster id of that engine's worker, as soon as it is linked and fits ours.

        The future's error says why not: ConnectionError, which the next call tries to mend, or
        ValueError that names what differs, which lasts.
        """
        with self._lock:
            link = self._links.get(source.remote_engine_id)
            if link is None or self._is_lost(link):
                link = self._threads.submit(self._link, source)
                self._links[source.remote_engine_id] = link
            return link

    def close(self) -> None:
        """Waits for the links that are being made."""
        self._threads.shutdown(cancel_futures=True)

    def _is_lost(self, link: Future[int]) -> bool:
        if not link.done():
            return False
        if error := link.exception():
            return not isinstance(error, ValueError)
        return all(each.cluster_id != link.result() for each in self._datadist.links())

    def _link(self, source: Handover) -> int:
        cluster_id = cluster_id_of(source.remote_engine_id, self._rank)
        info = LLMClusterInfo()
        info.remote_cluster_id = cluster_id
        info.append_local_ip_info("0.0.0.0", 0)
        info.append_remote_ip_info(source.remote_host, source.remote_port + self._rank)
        status, _ = self._datadist.link_clusters([info], int(self._link_timeout_s * 1000))
        if status not in (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK):
            raise ConnectionError(f"cannot link to it: {status.name} (the log says more)")
        if different := differences(self._facts, self._read_facts(cluster_id)):
            raise ValueError(f"it does not fit: {'; '.join(different)}")
        logger.info("linked to %s", source.remote_engine_id)
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
