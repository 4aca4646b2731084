"""A running cluster, seen from one of our own that links to it and takes its leave."""

from __future__ import annotations

import os
import secrets
import socket
import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.cli.doctor.findings import Case, Finding, State
from llm_datadist.cli.doctor.log import LogBook, log_book
from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.config import LLMConfig
from llm_datadist.core.messages import PROTOCOL_VERSION
from llm_datadist.datadist import LLMDataDist
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.keys import BlocksCacheKey
from llm_datadist.options import SECURITY_VARIABLE
from llm_datadist.types import CacheDesc, DataType, LLMRole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.endpoint import Endpoint

_TIMEOUT_MS = 3000
_NAME = "link"
_ROUND_TRIPS = 20
#: of an answer: Python threads take turns every 5 ms
_SLOW_S = 0.1
_BUSY = (
    "its process is busy, or a C call in it holds the GIL: two-sided and TCP answers wait for "
    "that, remote-accessible reads on one host do not"
)
_MODES = {True: "remote-accessible", False: "two-sided"}


def running_cluster(case: Case) -> Iterator[Finding]:
    """Links in the peer's mode, which is found out: it refuses the other one."""
    assert case.peer is not None
    reason = ""
    for is_accessible in _MODES:
        with log_book() as book, _cluster(is_accessible) as datadist:
            begun = time.perf_counter()
            status = datadist.link_clusters([_info(case.peer)], _TIMEOUT_MS)[0]
            link_s = time.perf_counter() - begun
            if status is LLMStatusCode.LLM_SUCCESS:
                yield from _describe(datadist, _MODES[is_accessible], link_s, book)
                return
            reason = book.reason
            if status is not LLMStatusCode.LLM_PARAM_INVALID:  # the modes do not differ
                break
    data = {"endpoint": str(case.peer), "status": status.name}
    found = f"{case.peer} could not be linked ({status.name}): {reason}"
    yield Finding(_NAME, State.PROBLEM, found, _remedy(status), data)


@contextmanager
def _cluster(is_accessible: bool) -> Iterator[LLMDataDist]:
    """A cluster that nobody knows, which listens nowhere."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = is_accessible
    datadist = LLMDataDist(LLMRole.DECODER, secrets.randbits(63))
    datadist.init(config.generate_options())
    try:
        yield datadist
    finally:
        datadist.finalize()


def _info(peer: Endpoint, cluster_id: int | None = None) -> LLMClusterInfo:
    info = LLMClusterInfo()
    if cluster_id is not None:
        info.remote_cluster_id = cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info(*peer)
    return info


def _describe(datadist: LLMDataDist, mode: str, link_s: float, book: LogBook) -> Iterator[Finding]:
    (link,) = datadist.links()
    assert link.endpoint is not None
    yield Finding(
        _NAME,
        State.OK,
        f"{link.endpoint} is cluster {link.cluster_id}, {mode}, protocol {PROTOCOL_VERSION}; "
        f"linked in {link_s * 1e3:.1f} ms",
        data={
            "endpoint": str(link.endpoint),
            "cluster_id": link.cluster_id,
            "mode": mode,
            "protocol": PROTOCOL_VERSION,
            "link_s": link_s,
            "our_cluster_id": datadist.cluster_id,
        },
    )
    yield _path(link.path, link.path_reason, is_mendable=bool(book.warnings))
    yield _round_trip(datadist.cache_manager, link.cluster_id, link.endpoint)
    datadist.unlink_clusters([_info(link.endpoint, link.cluster_id)], _TIMEOUT_MS)


def _path(path: str, reason: str, *, is_mendable: bool) -> Finding:
    data = {"path": path, "path_reason": reason}
    found = f"{path}, verified in both directions"
    if not reason:
        return Finding("path", State.OK, found, data=data)
    if not is_mendable:
        return Finding("path", State.NOTE, f"{found}; {reason}", data=data)
    return Finding("path", State.PROBLEM, f"{found}; this host has a better one", reason, data)


def _round_trip(manager: CacheManager, cluster_id: int, endpoint: Endpoint) -> Finding:
    """By asking for a cache that nobody has: no cache of the peer's is touched.

    The peer's process has to answer that; its kernel alone takes a connection.
    """
    word = np.zeros(1, dtype=np.uint64)
    desc = CacheDesc(1, [1, 1], DataType.DT_UINT64)
    cache = manager.register_blocks_cache(desc, [word])
    nobodys = BlocksCacheKey(cluster_id, secrets.randbits(62))
    seconds = []
    for _ in range(1 + _ROUND_TRIPS):
        begun = time.perf_counter()
        try:
            manager.pull_blocks(nobodys, cache, [0], [0])
        except LLMException as error:
            if error.status_code is not LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
                return Finding("round trip", State.PROBLEM, f"a look-up failed: {error}", _BUSY)
        seconds.append(time.perf_counter() - begun)
    round_trip_s, slowest_s = statistics.median(seconds[1:]), max(seconds[1:])  # 0: it connects
    kernel_s = _connect_s(endpoint)
    found = (
        f"{round_trip_s * 1e6:.0f} us for a look-up of a cache, {slowest_s * 1e6:.0f} us at most; "
        f"its kernel takes a connection in {kernel_s * 1e6:.0f} us"
    )
    is_slow = slowest_s > max(_SLOW_S, 10 * kernel_s)
    return Finding(
        "round trip",
        State.NOTE if is_slow else State.OK,
        found,
        _BUSY if is_slow else "",
        {"round_trip_s": round_trip_s, "slowest_s": slowest_s, "kernel_s": kernel_s},
        f"{round_trip_s * 1e6:.0f} us",
    )


def _connect_s(endpoint: Endpoint) -> float:
    """What the way there takes, and nothing of the process at its end."""
    begun = time.perf_counter()
    with socket.create_connection(endpoint, _TIMEOUT_MS / 1000):
        return time.perf_counter() - begun


def _remedy(status: LLMStatusCode) -> str:
    if status is LLMStatusCode.LLM_TIMEOUT:
        return "is it a firewall, does the peer stand still, or does a C call there hold the GIL?"
    if status is LLMStatusCode.LLM_FAILED:
        have = "is" if os.environ.get(SECURITY_VARIABLE) else "is not"
        return f"is it a cluster? {SECURITY_VARIABLE} {have} set here: both ends need the same"
    return ""  # the reason says what to do
