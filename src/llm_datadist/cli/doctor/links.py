"""Links that are really made: to a running cluster, and on each path of this host.

What the library logs meanwhile says why a link failed, or is slow.
"""

from __future__ import annotations

import logging
import os
import secrets
import statistics
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.cli.bench import ours
from llm_datadist.cli.bench.contestant import Job, Owner, Pair
from llm_datadist.cli.bench.options import usual_threads
from llm_datadist.cli.bench.rivals import Memcpy
from llm_datadist.cli.bench.workload import CacheMemory, Workload
from llm_datadist.cli.doctor.findings import Case, Finding, State
from llm_datadist.cli.failure import CommandError
from llm_datadist.cli.kernel_files import free_nbytes
from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.config import LLMConfig
from llm_datadist.core.messages import PROTOCOL_VERSION
from llm_datadist.datadist import LLMDataDist
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.keys import BlocksCacheKey
from llm_datadist.observe.log import LOGGER_NAME, get_logger
from llm_datadist.options import SECURITY_VARIABLE
from llm_datadist.transport.nixl_agent import package
from llm_datadist.types import CacheDesc, DataType, LLMRole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.endpoint import Endpoint

_TIMEOUT_MS = 3000
_NAME = "link"
_ROUND_TRIPS = 20
_MODES = {True: "remote-accessible", False: "two-sided"}

#: 64 MiB in scattered blocks of 32 KiB, an eighth of what the bench moves
_WORKLOAD = Workload("doctor", 16, 144, 32 * 1024, 128)
_PATHS = ("cma", "tcp")
_MEASURE_S = 0.3
_LEAST_MOVES = 3
_REMEDIES = {
    "cma": "see seccomp and ptrace scope; until then links on this host use tcp, which is slower",
    "tcp": "a firewall on loopback? without tcp there are no links at all",
    "nixl": "links do without it; UCX_LOG_LEVEL=info says more",
}


class LogBook(logging.Handler):
    """Keeps warnings and errors, in place of printing them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    @property
    def warnings(self) -> list[str]:
        return [record.getMessage() for record in self._records if record.levelno < logging.ERROR]

    @property
    def reason(self) -> str:
        """Why the last link failed; empty when none did."""
        reasons = [record.reason for record in self._records if hasattr(record, "reason")]
        return str(reasons[-1]) if reasons else ""


@contextmanager
def log_book() -> Iterator[LogBook]:
    """Keeps what is logged meanwhile."""
    logger, book = get_logger(), LogBook()
    handlers, logger.handlers, level = logger.handlers, [book], logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield book
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


def log_to_stderr() -> None:
    """Keeps the log of this process out of what the command prints. Before anything is logged."""
    logging.getLogger(LOGGER_NAME).addHandler(logging.StreamHandler())


# -- a running cluster, seen from one of our own that links to it and takes its leave --


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
    yield _round_trip(datadist.cache_manager, link.cluster_id)
    datadist.unlink_clusters([_info(link.endpoint, link.cluster_id)], _TIMEOUT_MS)


def _path(path: str, reason: str, *, is_mendable: bool) -> Finding:
    data = {"path": path, "path_reason": reason}
    found = f"{path}, verified in both directions"
    if not reason:
        return Finding("path", State.OK, found, data=data)
    if not is_mendable:
        return Finding("path", State.NOTE, f"{found}; {reason}", data=data)
    return Finding("path", State.PROBLEM, f"{found}; this host has a better one", reason, data)


def _round_trip(manager: CacheManager, cluster_id: int) -> Finding:
    """By asking for a cache that nobody has: no cache of the peer's is touched."""
    word = np.zeros(1, dtype=np.uint64)
    desc = CacheDesc(1, [1, 1], DataType.DT_UINT64)
    cache = manager.register_blocks_cache(desc, [int(word.ctypes.data)])
    nobodys = BlocksCacheKey(cluster_id, secrets.randbits(62))
    seconds = []
    for _ in range(1 + _ROUND_TRIPS):
        begun = time.perf_counter()
        try:
            manager.pull_blocks(nobodys, cache, [0], [0])
        except LLMException as error:
            if error.status_code is not LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
                return Finding("round trip", State.PROBLEM, f"a look-up failed: {error}")
        seconds.append(time.perf_counter() - begun)
    round_trip_s = statistics.median(seconds[1:])  # the first one opens the connection
    found = f"{round_trip_s * 1e6:.0f} us for a look-up of a cache"
    return Finding("round trip", State.OK, found, data={"round_trip_s": round_trip_s})


def _remedy(status: LLMStatusCode) -> str:
    if status is LLMStatusCode.LLM_TIMEOUT:
        return "is it a firewall, or does the peer stand still?"
    if status is LLMStatusCode.LLM_FAILED:
        have = "is" if os.environ.get(SECURITY_VARIABLE) else "is not"
        return f"is it a cluster? {SECURITY_VARIABLE} {have} set here: both ends need the same"
    return ""  # the reason says what to do


# -- a measured figure for each path: two processes on this host, by the public interface --


def paths(_: Case) -> Iterator[Finding]:
    """The ceiling, and what each path makes of it."""
    needed, (free, _is_container) = 4 * _WORKLOAD.cache_nbytes, free_nbytes()
    if free < needed:
        found = f"not measured: it takes {needed >> 20} MiB of memory, {free >> 20} are free"
        yield Finding("speed", State.NOTE, found)
        return
    job = Job(_WORKLOAD, threads=usual_threads())
    ours.start(LLMRole.DECODER, ours.READER_ID, job).finalize()  # that clusters start here at all
    ceiling = _gb_per_s(Memcpy(job).move)
    found = f"{ceiling:.2f} GB/s with {job.threads} threads: the ceiling"
    yield Finding("memcpy", State.OK, found, data={"gb_per_s": ceiling})
    try:
        with closing(Owner(_own, job)) as owner:
            memory = CacheMemory(_WORKLOAD)
            for path in _PATHS:
                memory.poison()
                yield _measure(replace(job, path=path), owner, memory, ceiling)
    except CommandError as error:
        remedy = "what else is marked here says why"
        yield Finding("speed", State.PROBLEM, f"no path works: {error}", remedy)
    if package() is not None:
        yield _measure_nixl(replace(job, path="nixl"), ceiling)


def _own(pipe: Connection, job: Job) -> None:
    log_to_stderr()
    ours.own(pipe, job)


def _measure(job: Job, owner: Owner, memory: CacheMemory, ceiling: float) -> Finding:
    with log_book() as book:
        datadist = ours.start(LLMRole.DECODER, ours.READER_ID, job)
        try:
            port, _cache_id = owner.greeting
            ours.link(datadist, ours.OWNER_ID, port)
            cache = ours.register(datadist, job.workload, memory, as_rows=False)
            src, dst = (blocks.tolist() for blocks in job.workload.blocks())

            def pull() -> None:
                datadist.cache_manager.pull_blocks(ours.KEY, cache, src, dst)

            pull()
            if not memory.has_arrived():
                raise CommandError(f"{job.path} did not move the bytes that it was asked to")
            speed = _gb_per_s(pull)
        except CommandError as error:
            found = f"does not work: {book.reason or error}"
            return Finding(job.path, State.PROBLEM, found, _REMEDIES[job.path])
        except LLMException as error:
            return Finding(job.path, State.PROBLEM, f"a pull failed: {error}", _REMEDIES[job.path])
        finally:
            datadist.finalize()
    found = f"{speed:.2f} GB/s, {speed / ceiling:.2f} of memcpy; every byte verified"
    return Finding(job.path, State.OK, found, data={"gb_per_s": speed})


def _measure_nixl(job: Job, ceiling: float) -> Finding:
    """Both ends in other processes, which UCX may take down with it."""
    try:
        with Pair("nixl", _pulls, job, {}) as pair:
            is_honest = pair.is_honest()
            seconds = statistics.median(pair.measure(_LEAST_MOVES))
    except CommandError as error:
        return Finding("nixl", State.NOTE, f"does not work: {error}", _REMEDIES["nixl"])
    if not is_honest:
        return Finding("nixl", State.PROBLEM, "moved other bytes than it was asked to")
    speed = _WORKLOAD.moved_nbytes / seconds / 1e9
    found = f"{speed:.2f} GB/s, {speed / ceiling:.2f} of memcpy; every byte verified"
    return Finding("nixl", State.OK, found, data={"gb_per_s": speed})


def _pulls(job: Job) -> ours.Ours:
    os.dup2(2, 1)  # UCX prints too, here and in the owner, which inherits that
    return ours.Ours(job)


def _gb_per_s(move: Callable[[], None]) -> float:
    seconds: list[float] = []
    while len(seconds) < _LEAST_MOVES or sum(seconds) < _MEASURE_S:
        begun = time.perf_counter()
        move()
        seconds.append(time.perf_counter() - begun)
    return _WORKLOAD.moved_nbytes / statistics.median(seconds) / 1e9
