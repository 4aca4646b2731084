"""A measured figure for each path: two processes on this host, by the public interface."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from llm_datadist.cli.bench import ours
from llm_datadist.cli.bench.contestant import Job, Owner, Pair
from llm_datadist.cli.bench.options import usual_threads
from llm_datadist.cli.bench.rivals import Memcpy
from llm_datadist.cli.bench.workload import CacheMemory, Workload
from llm_datadist.cli.doctor.findings import Case, Finding, State
from llm_datadist.cli.doctor.log import log_book, log_to_stderr
from llm_datadist.cli.failure import CommandError
from llm_datadist.cli.kernel_files import free_nbytes
from llm_datadist.errors import LLMException
from llm_datadist.transport.nixl_agent import package
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection


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
    yield Finding(
        "memcpy", State.OK, found, data={"gb_per_s": ceiling}, brief=f"{ceiling:.2f} GB/s"
    )
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
    return Finding(job.path, State.OK, found, data={"gb_per_s": speed}, brief=f"{speed:.2f} GB/s")


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
    return Finding("nixl", State.OK, found, data={"gb_per_s": speed}, brief=f"{speed:.2f} GB/s")


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
