"""What single blocks cost: the first pull behind a link, and many threads on one link."""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from llm_datadist import LLMRole, LLMStatusCode
from llm_datadist.cli.bench import ours
from llm_datadist.cli.bench.contestant import Job, Owner
from llm_datadist.cli.bench.scenarios import Figure
from llm_datadist.cli.bench.workload import SHAPES, CacheMemory
from llm_datadist.cli.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llm_datadist import Cache, LLMDataDist

#: one block; the cache has one for each thread
_THREADS = 32
_SHAPE = replace(SHAPES["one-block"], num_blocks=2 * _THREADS)
_WARM = 20
#: a thread has its turn every 160 ms: the interpreter changes every 5 ms
_SPAN_S = 3.0


def calls(rounds: int, path: str, mode: str) -> Iterator[Figure]:
    """One block of 32 KiB: first and later pulls, and 32 threads beside one."""
    job = Job(_SHAPE, path=path, is_accessible=mode == "remote-accessible", threads=1)
    with ExitStack() as stack:
        owner = Owner(ours.own, job)
        stack.callback(owner.close)
        datadist = ours.start(LLMRole.DECODER, ours.READER_ID, job)
        stack.callback(datadist.finalize)
        memory = CacheMemory(_SHAPE)
        cache = ours.register(datadist, _SHAPE, memory, as_rows=False)
        port = owner.greeting[0]
        yield from _first(datadist, cache, port, rounds)
        ours.link(datadist, ours.OWNER_ID, port)
        yield from _threads(datadist, cache, rounds)


def _first(datadist: LLMDataDist, cache: Cache, port: int, rounds: int) -> Iterator[Figure]:
    first, later = [], []
    for _ in range(max(rounds, 5)):
        ours.link(datadist, ours.OWNER_ID, port)
        first.append(_seconds(_puller(datadist, cache, 0)))
        later += [_seconds(_puller(datadist, cache, 0)) for _ in range(_WARM)]
        status, _ = datadist.unlink_clusters([ours.info(ours.OWNER_ID, port)], 10_000)
        if status is not LLMStatusCode.LLM_SUCCESS:
            raise CommandError(f"unlinking ended with {status}")
    cold, warm = statistics.median(first), statistics.median(later)
    yield Figure("the first pull behind a link", cold * 1e6, "us")
    yield Figure("a later one", warm * 1e6, "us")
    yield Figure("the first takes as long as", cold / warm, "x a later one")


def _threads(datadist: LLMDataDist, cache: Cache, rounds: int) -> Iterator[Figure]:
    alone, together, slowest = [], [], []
    for _ in range(rounds):
        alone += _rates(datadist, cache, 1)
        rates = _rates(datadist, cache, _THREADS)
        together.append(sum(rates))
        slowest.append(min(rates) / statistics.mean(rates))
    one, all_of_them = statistics.median(alone), statistics.median(together)
    yield Figure("pulls by one thread", one, "a second")
    yield Figure(f"pulls by {_THREADS} threads", all_of_them, "a second")
    yield Figure("together, of one thread's", all_of_them / one, "x")
    yield Figure("the slowest thread, of the mean", statistics.median(slowest), "x")


def _rates(datadist: LLMDataDist, cache: Cache, count: int) -> list[float]:
    """Pulls a second of so many threads at once, each into a block of its own."""
    counts = [0] * count
    ready = threading.Barrier(count)

    def work(index: int) -> None:
        pull = _puller(datadist, cache, index)
        ready.wait()
        until = time.perf_counter() + _SPAN_S
        while time.perf_counter() < until:
            pull()
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not all(counts):
        raise CommandError("a thread could not pull")
    return [each / _SPAN_S for each in counts]


def _puller(datadist: LLMDataDist, cache: Cache, index: int) -> Callable[[], None]:
    manager = datadist.cache_manager
    src, dst = [_THREADS + index], [index]
    return lambda: manager.pull_blocks(ours.KEY, cache, src, dst)


def _seconds(move: Callable[[], None]) -> float:
    begun = time.perf_counter()
    move()
    return time.perf_counter() - begun
