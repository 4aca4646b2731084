"""Linking to an engine: to who is at an address, if it is who it should be, and fits.

Who is there is asked before it is linked, since a link has effects on others: a second one to an
engine that is linked already, by another of its addresses, ends the first one.
"""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
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
from llm_datadist.integrations.vllm.printable import printable
from llm_datadist.integrations.vllm.shapes import misfits, shape_of
from llm_datadist.peer.asking import ask_stats

if TYPE_CHECKING:
    from llm_datadist import LLMDataDist
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.integrations.vllm.shapes import Shape
    from llm_datadist.link_security import LinkSecurity

_FACTS_NBYTES = 256 * 1024
#: before a link that was lost is made anew
PAUSE_S = 0.05
_MADE = (
    LLMStatusCode.LLM_SUCCESS,
    LLMStatusCode.LLM_ALREADY_LINK,
    LLMStatusCode.LLM_NOT_YET_LINK,  # and lost at once
)


class Misfit(Exception):
    """The engine differs from ours in what must be equal. It lasts as long as the link."""


class AnotherEngine(Exception):
    """Who is at the address is not who made the hand-over."""


class Linked(NamedTuple):
    """A link to a worker that fits."""

    endpoint: Endpoint
    shape: Shape


class Linking:
    """Makes links, and says which there are. Thread-safe.

    `facts` must be equal at both ends, and the KV memories, whose shape is ours, must fit. Both lie
    in memory that the other end pulls after linking.
    """

    def __init__(
        self,
        datadist: LLMDataDist,
        model_id: int,
        facts: dict[str, Any],
        shape: Shape,
        security: LinkSecurity | None,
        timeout_s: float,
    ) -> None:
        self._datadist, self._model_id = datadist, model_id
        self._security, self._timeout_s = security, timeout_s
        text = json.dumps([facts, msgspec.to_builtins(shape)]).encode()
        if len(text) > _FACTS_NBYTES:
            raise ValueError(f"the names of the model's layers take {len(text)} bytes: too many")
        self._facts: dict[str, Any] = json.loads(text)[0]
        self._shape = shape
        self._memory = np.zeros(_FACTS_NBYTES, np.uint8)
        self._memory[: len(text)] = np.frombuffer(text, np.uint8)
        datadist.cache_manager.register_blocks_cache(
            CacheDesc(1, [1, _FACTS_NBYTES], DataType.DT_UINT8),
            [self._memory.ctypes.data],
            BlocksCacheKey(datadist.cluster_id, model_id),
        )
        self._closed = threading.Event()

    def link(self, cluster_id: int, host: str, port: int) -> Linked:
        """Links to the cluster at its address, which is returned as `in_use` says it.

        Raises AnotherEngine, Misfit; ConnectionError when it cannot be linked; RuntimeError,
        ValueError for a host that is none.
        """
        until = time.monotonic() + self._timeout_s
        info = _info(cluster_id, host, port)
        while (shape := self._link_once(cluster_id, info, until)) is None:
            self.pause()
        return Linked(info.remote_endpoints[0], shape)

    def in_use(self, cluster_id: int) -> tuple[bool, Endpoint | None]:
        """Whether the cluster is linked, and where the one was called that is read from then.

        None: it has called us.
        """
        for link in self._datadist.links():  # the newest first
            if link.cluster_id == cluster_id:
                return True, link.endpoint
        return False, None

    def check_other(self, cluster_id: int) -> None:
        """Raises ConnectionError for our own id."""
        if cluster_id == self._datadist.cluster_id:
            raise ConnectionError("an engine cannot read from itself")

    def pause(self, seconds: float = PAUSE_S) -> None:
        """A moment, before a link that was lost is made anew. Raises as `check_open`."""
        self._closed.wait(seconds)
        self.check_open()

    def check_open(self) -> None:
        """Raises ConnectionError when we are closed."""
        if self._closed.is_set():
            raise ConnectionError("the connector was shut down")

    def close(self) -> None:
        """What follows ends with an error."""
        self._closed.set()

    def _link_once(self, cluster_id: int, info: LLMClusterInfo, until: float) -> Shape | None:
        """What its memory is like; it is linked, and fits. None if the link was lost at once."""
        (endpoint,) = info.remote_endpoints
        self._ask_who_is_there(cluster_id, endpoint, until)
        status, _ = self._datadist.link_clusters([info], max(1, int(_left_s(until) * 1000)))
        if status not in _MADE:
            raise ConnectionError(f"cannot link to it: {status.name} (the log says more)")
        self._end_links_of_others(cluster_id, endpoint)
        try:
            theirs = self._read_facts(cluster_id)
        except LLMException as error:
            is_lost = error.status_code is LLMStatusCode.LLM_NOT_YET_LINK
            if not is_lost or time.monotonic() > until:
                raise ConnectionError(f"it does not say what it is: {error}") from error
            return None
        return self._fitting(theirs)

    def _fitting(self, said: object) -> Shape:
        facts, shape = said if isinstance(said, list) and len(said) == 2 else (said, None)
        if different := differences(self._facts, facts):
            raise Misfit(f"it does not fit: {'; '.join(different)}")
        try:
            theirs = shape_of(shape)
        except ValueError as error:
            raise Misfit(f"it does not fit: {error}") from None
        if different := misfits(self._shape, theirs):
            raise Misfit(f"it does not fit: {printable('; '.join(different))}")
        return theirs

    def _ask_who_is_there(self, cluster_id: int, endpoint: Endpoint, until: float) -> None:
        try:
            there = ask_stats(endpoint, self._security, _left_s(until)).cluster_id
        except LLMException as error:
            raise ConnectionError(f"cannot link to it: {error}") from error
        if there != cluster_id:
            raise AnotherEngine(f"another engine is at its address: {there}, not {cluster_id}")

    def _end_links_of_others(self, cluster_id: int, endpoint: Endpoint) -> None:
        """Who was asked first and linked then may have said two things."""
        others = {
            link.cluster_id
            for link in self._datadist.links()
            if link.endpoint == endpoint and link.cluster_id != cluster_id
        }
        for other in others:
            self._datadist.unlink_clusters([_info(other, *endpoint)], force=True)
        if others:
            raise AnotherEngine(f"who is at its address says that it is {min(others)}, too")

    def _read_facts(self, cluster_id: int) -> object:
        memory = np.zeros(_FACTS_NBYTES, np.uint8)  # of its own: a peer may hang
        manager = self._datadist.cache_manager
        desc = CacheDesc(1, [1, _FACTS_NBYTES], DataType.DT_UINT8)
        cache = manager.register_blocks_cache(desc, [memory.ctypes.data])
        try:
            key = BlocksCacheKey(cluster_id, self._model_id)
            manager.pull_blocks(key, cache, [0], [0], tensor_num_per_layer=1)
        finally:
            manager.unregister_cache(cache.cache_id)
        facts: object = json.loads(memory.tobytes().rstrip(b"\0"))
        return facts


def _info(cluster_id: int, host: str, port: int) -> LLMClusterInfo:
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    info.append_local_ip_info("0.0.0.0", 0)
    info.append_remote_ip_info(host, port)
    return info


def _left_s(until: float) -> float:
    return max(0.001, until - time.monotonic())
