"""Contestants: all that can move a workload, each in a pair of processes of its own.

Pairs that are not measured stand still (SIGSTOP), so that one's progress threads do not take the
cores of another.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from llm_datadist.cli.bench.workload import CacheMemory
from llm_datadist.cli.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from typing_extensions import Self

    from llm_datadist.cli.bench.workload import Workload

_START_S = 120.0
_MOVE_S = 300.0


@dataclass(frozen=True)
class Job:
    """What a contestant is to do."""

    workload: Workload
    operation: str = "pull_blocks"
    path: str = "auto"
    is_accessible: bool = True
    threads: int = 0  #: 0: as many as it thinks best
    verifies: bool = False  #: by checksum (verify_transfers)


class Contestant(Protocol):
    """One way to move a workload, in the process that asks for the bytes."""

    detail: str  #: how it moves: path, mode

    def move(self) -> None:
        """Moves everything once, and returns when it has arrived."""

    def poison(self) -> None:
        """Makes the destination hold what no source does."""

    def has_arrived(self) -> bool: ...

    def pids(self) -> list[int]:
        """The processes at work besides this one."""

    def close(self) -> None: ...


class _Answer(NamedTuple):
    """What a contestant's process says to the one that measures."""

    failure: str = ""
    detail: str = ""
    pids: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    is_honest: bool = False


class Owner:
    """The process that has the source. `main(pipe, *args)` runs there until the pipe closes."""

    def __init__(self, main: Callable[..., None], *args: object) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()
        if not self.pipe.poll(_START_S):
            raise CommandError("the owner of the source did not start")
        try:
            self.greeting = self.pipe.recv()
        except EOFError:
            raise CommandError("the owner of the source ended before it was ready") from None

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def wait_for_end(pipe: Connection) -> None:
    """Returns when the other end of the pipe is gone."""
    try:
        pipe.recv()
    except EOFError:
        return


class Puller:
    """What most contestants are: the source is an owner's, the destination this process's."""

    def __init__(self, job: Job, owner_main: Callable[..., None], *args: object) -> None:
        self.job = job
        self.memory = CacheMemory(job.workload)
        self.owner = Owner(owner_main, job, *args)

    def poison(self) -> None:
        self.memory.poison()

    def has_arrived(self) -> bool:
        return self.memory.has_arrived()

    def pids(self) -> list[int]:
        return [self.owner.pid]

    def close(self) -> None:
        self.owner.close()


class Pair:
    """A contestant from outside. A context manager; it stands still unless `measure` runs."""

    def __init__(
        self, name: str, make: Callable[[Job], Contestant], job: Job, env: dict[str, str]
    ) -> None:
        self.name = name
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # not a daemon: it has a child of its own
        self._process = context.Process(target=_serve, args=(theirs, make, job, env))
        self._process.start()
        theirs.close()
        ready = self._answer(_START_S)
        self.detail = ready.detail
        self._pids = list(ready.pids)
        self._signal(signal.SIGSTOP)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        self._process.join()
        self._pipe.close()

    def measure(self, repeats: int) -> list[float]:
        """The seconds that each of so many moves took."""
        return list(self._call("measure", repeats).seconds)

    def is_honest(self) -> bool:
        """Moves into poisoned memory and looks at every byte."""
        return self._call("verify", 1).is_honest

    def _call(self, verb: str, repeats: int) -> _Answer:
        self._signal(signal.SIGCONT)
        try:
            self._pipe.send((verb, repeats))
            return self._answer(_MOVE_S)
        finally:
            self._signal(signal.SIGSTOP)

    def _answer(self, timeout_s: float) -> _Answer:
        try:
            if not self._pipe.poll(timeout_s):
                raise CommandError(f"{self.name} did not answer within {timeout_s:.0f} s")
            answer: _Answer = self._pipe.recv()
        except EOFError:
            raise CommandError(f"{self.name}: its process ended") from None
        if answer.failure:
            raise CommandError(f"{self.name}: {answer.failure}")
        return answer

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids:
            os.kill(pid, number)


def _serve(
    pipe: Connection, make: Callable[[Job], Contestant], job: Job, env: dict[str, str]
) -> None:
    os.environ.update(env)  # before the contestant's library is loaded
    try:
        contestant = make(job)
        pipe.send(_Answer(detail=contestant.detail, pids=(*contestant.pids(), os.getpid())))
        while True:
            verb, repeats = pipe.recv()
            pipe.send(_VERBS[verb](contestant, repeats))
    except EOFError:
        contestant.close()
    except Exception as error:
        [line] = traceback.format_exception_only(type(error), error)[-1:]
        pipe.send(_Answer(failure=line.strip()))


def _measure(contestant: Contestant, repeats: int) -> _Answer:
    contestant.move()  # the process stood still: its caches are cold
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        contestant.move()
        seconds.append(time.perf_counter() - begun)
    return _Answer(seconds=tuple(seconds))


def _verify(contestant: Contestant, _: int) -> _Answer:
    contestant.poison()
    contestant.move()
    return _Answer(is_honest=contestant.has_arrived())


_VERBS: dict[str, Callable[[Contestant, int], _Answer]] = {"measure": _measure, "verify": _verify}
