"""Exceptions out of a signal handler, at random moments of any call: what tests and soak share."""

from __future__ import annotations

import gc
import random
import signal
import sys
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from edges.user import EVERY, KEY, LATER, SMALL, SUCCESS, User, holds_only, settings, status_of
from llm_datadist import (
    LayerSynchronizer,
    LLMException,
    LLMRole,
    TransferWithCacheKeyConfig,
)
from llm_datadist.testing.timing import eventually
from soak.stage import Doing
from soak.tally import descriptors, threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from llm_datadist import LLMStatusCode
    from llm_datadist.testing.cluster import Node

#: the longest delay of the timer, in seconds: longer than most of the calls take
LONGEST_S = 6e-4
#: more calls than the longest delay has room for
MANY = 1000
#: of a call, beside its own thread
HELPERS = 3


class Interrupted(Exception):
    """What the handler raises."""


class Found(NamedTuple):
    """How many calls were interrupted; the calls that failed by themselves; what was wrong."""

    interrupted: int
    failed: list[str]
    wrong: list[str]


#: the timer was taken back: its signal may come still, by way of another thread
_late: list[None] = []


@contextmanager
def interrupts() -> Iterator[None]:
    """The handler is there. In the main thread of a process."""

    def strike(*_: object) -> None:
        if not _late:
            raise Interrupted

    _late.clear()
    before = signal.signal(signal.SIGALRM, strike)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def is_interrupted(call: Callable[[], object], delay_s: float) -> bool:
    """Calls again and again until the timer strikes. Raises what the call raises."""
    try:
        try:
            _late.clear()
            signal.setitimer(signal.ITIMER_REAL, delay_s)
            for _ in range(MANY):
                call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            _late.append(None)
    except Interrupted:
        return True
    return False  # it struck where no exception passes: a finalizer


class Strikes:
    """Exceptions of a handler, several of them one behind the other, in calls and nowhere else.

    In the main thread of a process. `files` narrows it down: only where the thread is in one of
    these, so that rare places are found soon.
    """

    def __init__(self, kind: type[BaseException] = Interrupted, files: Sequence[str] = ()) -> None:
        self._kind, self._files = kind, tuple(files)
        self._left = 0
        self._is_striking = False
        #: in the last call
        self.count = 0
        #: struck where no exception passes: in a finalizer
        self.unraisable = 0
        signal.signal(signal.SIGALRM, self._strike)
        sys.unraisablehook = self._note

    def within(
        self, call: Callable[[], object], first_s: float, again_s: float = 0.0, most: int = 1
    ) -> BaseException | None:
        """What came out of the call, if anything."""
        self._left, self.count, came = most, 0, None
        try:
            signal.setitimer(signal.ITIMER_REAL, first_s, again_s)
            self._call(call)
        except Exception as error:
            came = error
        self._left = 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        return came

    def _call(self, call: Callable[[], object]) -> None:
        call()

    def _strike(self, _: int, frame: FrameType | None) -> None:
        if self._left <= 0 or self._is_striking:
            return
        self._is_striking = True  # the next signal finds this one at it
        try:
            self._strike_in(frame)
        finally:
            self._is_striking = False

    def _strike_in(self, frame: FrameType | None) -> None:
        if self._files and not (frame and frame.f_code.co_filename.endswith(self._files)):
            return
        while frame is not None:
            if frame.f_code is Strikes._call.__code__:
                self._left -= 1
                self.count += 1
                raise self._kind("struck")
            frame = frame.f_back

    def _note(self, _: object) -> None:
        self.unraisable += 1


class Ready(LayerSynchronizer):
    """Has every layer ready."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


class Held(LayerSynchronizer):
    """Has its layers ready when it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return self.let_go.wait(60)


class Victim:
    """A user whose calls are interrupted; memory is looked at after each that could be written."""

    def __init__(self, node: Node, path: str, port: int) -> None:
        self._user = User(node, path, port)
        self._port, self._node, self._manager = port, node, node.manager
        self._spare = [node.blocks_cache(*SMALL) for _ in range(2)]
        self._ready, self._config = Ready(), TransferWithCacheKeyConfig(KEY, range(1), range(1))
        self._memory = node.arrays[self._spare[0].cache_id]
        self.calls: dict[str, Callable[[], object]] = {
            "pull": self._user.pull,
            "pull some": self._pull_some,
            "push": self._user.push,
            "copy": self._user.copy,
            "swap": self._user.swap,
            "transfer": self._transfer,
            "wait for layers": self._wait_for_layers,
            "register": self._register,
            "link": self._relink,
            "links": self._look,
        }

    def interrupt(self, names: list[str], count: int, seed: int) -> Found:
        """So many interruptions of these calls, by turns."""
        draw, found, failed, wrong = random.Random(seed), 0, [], []
        for turn in range(20 * count):
            if found == count:
                break
            name = names[turn % len(names)]
            self._user.into[:] = 0
            if name == "wait for layers":
                self._begin_transfer()
            try:
                found += is_interrupted(self.calls[name], draw.uniform(2e-5, LONGEST_S))
            except LLMException as error:
                failed.append(f"{name}: {error}")
            if name == "link":
                self._mend()
            elif name == "wait for layers" and self._end_transfer() != SUCCESS:
                wrong.append("a transfer failed whose waiting caller was interrupted")
            wrong += self._what_is_late(name)
        return Found(found, failed, wrong)

    def warm_up(self) -> None:
        """Has all helper threads started: to be struck while one starts is another affair."""
        for _ in range(MANY):
            for thread in [Doing(self._user.pull) for _ in range(HELPERS)]:
                thread.result()
            if sum("mover" in thread.name for thread in threading.enumerate()) == HELPERS:
                return
        raise AssertionError("not all helpers were started")

    def is_well(self) -> list[str]:
        """What does not work any more, after all."""
        user, bad = self._user, []
        self._mend()
        for name in ("pull", "copy", "swap", "push", "transfer", "register", "link"):
            status = status_of(self.calls[name])
            if status != SUCCESS:
                bad.append(f"{name} afterwards: {status}")
        user.into[:] = 0
        if status_of(user.pull) != SUCCESS or not user.into.all():
            bad.append("a pull afterwards moved nothing, or not all")
        caches = (user.sink, user.source, user.host, *self._spare)
        return bad + [
            f"cache {cache.cache_id} cannot be unregistered"
            for cache in caches
            if status_of(partial(self._manager.unregister_cache, cache.cache_id)) != SUCCESS
        ]

    def _what_is_late(self, name: str) -> list[str]:
        """Of a call that has ended, nothing more is written into our memory."""
        if name not in ("pull", "copy", "swap"):
            return []
        self._user.into[:] = LATER
        is_kept = all(holds_only(self._user.into, LATER) for _ in range(2))
        return [] if is_kept else [f"bytes of {name} came after it had been interrupted"]

    def _pull_some(self) -> None:
        blocks = EVERY[::2]
        self._manager.pull_blocks(KEY, self._user.sink, blocks, blocks)

    def _transfer(self) -> None:
        args = (self._user.source, self._ready, [self._config], EVERY, EVERY)
        self._manager.transfer_cache_async(*args).synchronize(5000)

    def _begin_transfer(self) -> None:
        self._held = Held()
        args = (self._user.source, self._held, [self._config], EVERY, EVERY)
        self._task = self._manager.transfer_cache_async(*args)

    def _wait_for_layers(self) -> None:
        self._task.synchronize(50)

    def _end_transfer(self) -> LLMStatusCode:
        self._held.let_go.set()
        return self._task.synchronize(5000)

    def _register(self) -> None:
        addrs = [int(tensor.ctypes.data) for tensor in self._memory]
        cache = self._manager.register_blocks_cache(self._spare[0].cache_desc, addrs)
        self._manager.unregister_cache(cache.cache_id)

    def _relink(self) -> LLMStatusCode:
        self._node.unlink(self._port, 1)
        return self._node.link(self._port, 1)

    def _look(self) -> None:
        self._node.datadist.links()
        self._node.datadist.stats()

    def _mend(self) -> None:
        """A link whose making or end was interrupted is on its way to somewhere: it may be made
        behind an unlink that found none."""
        assert eventually(lambda: self._relink() == SUCCESS)


def run(
    node: Node,
    path: str,
    port: int,
    names: list[str],
    count: int,
    seed: int = 1,
    *,
    is_warm: bool = True,
) -> Found:
    """In a process of its own: interruptions, and what is left of them when all has ended."""
    tasks = threads()
    node.start(LLMRole.DECODER, 2, **settings(path))  # what is opened once is open then
    node.stop()
    before = descriptors(), tasks
    victim = Victim(node, path, port)
    if is_warm:
        victim.warm_up()
    with interrupts():
        found = victim.interrupt(names, count, seed)
    wrong = [*found.wrong, *victim.is_well()]
    del victim
    node.stop()
    gc.collect()
    if not eventually(lambda: descriptors() <= before[0] and threads() <= before[1]):
        after = descriptors(), threads()
        names_left = sorted(thread.name for thread in threading.enumerate())
        wrong.append(f"descriptors, threads: {before} before, {after} after: {names_left}")
    return found._replace(wrong=wrong)
