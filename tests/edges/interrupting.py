"""Exceptions out of a signal handler, at random moments of any call: what tests and soak share."""

from __future__ import annotations

import gc
import random
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from edges.user import EVERY, KEY, LATER, SMALL, SUCCESS, User, holds_only, settings, status_of
from llm_datadist import LayerSynchronizer, LLMException, LLMRole, TransferWithCacheKeyConfig
from llm_datadist.testing.cluster import Node
from llm_datadist.testing.timing import eventually
from soak.tally import descriptors, threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: the longest delay of the timer, in seconds: longer than most of the calls take
LONGEST_S = 6e-4


class Interrupted(Exception):  # noqa: N818  (a KeyboardInterrupt, a test's time-out)
    """What the handler raises."""


class Found(NamedTuple):
    """How many calls were interrupted; the calls that failed by themselves; what was wrong."""

    interrupted: int
    failed: list[str]
    wrong: list[str]


@contextmanager
def interrupts() -> Iterator[None]:
    """The handler is there. In the main thread of a process."""

    def strike(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, strike)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def is_interrupted(call: Callable[[], object], delay_s: float) -> bool:
    """Calls again and again until the timer strikes. Raises what the call raises."""
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, delay_s)
            while True:
                call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        return True


class Ready(LayerSynchronizer):
    """Has every layer ready."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


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
            "wait for layers": self._transfer,
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
            try:
                found += is_interrupted(self.calls[name], draw.uniform(2e-5, LONGEST_S))
            except LLMException as error:
                failed.append(f"{name}: {error}")
            if name == "link":
                self._mend()
            wrong += self._what_is_late(name)
        return Found(found, failed, wrong)

    def is_well(self) -> list[str]:
        """What does not work any more, after all."""
        user, bad = self._user, []
        self._mend()
        for name in ("pull", "copy", "swap", "push", "wait for layers", "register", "link"):
            status = status_of(self.calls[name])
            if status != SUCCESS:
                bad.append(f"{name} afterwards: {status}")
        user.into[:] = 0
        if status_of(user.pull) != SUCCESS or not user.into.all():
            bad.append("a pull afterwards moved nothing, or not all")
        for cache in (user.sink, user.source, user.host, *self._spare):
            if status_of(lambda: user.manager.unregister_cache(cache.cache_id)) != SUCCESS:  # noqa: B023
                bad.append(f"cache {cache.cache_id} cannot be unregistered")
        return bad

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

    def _register(self) -> None:
        addrs = [int(tensor.ctypes.data) for tensor in self._memory]
        cache = self._manager.register_blocks_cache(self._spare[0].cache_desc, addrs)
        self._manager.unregister_cache(cache.cache_id)

    def _relink(self) -> None:
        self._node.unlink(self._port, 1)
        self._node.link(self._port, 1)

    def _look(self) -> None:
        self._node.datadist.links()
        self._node.datadist.stats()

    def _mend(self) -> None:
        """A link whose making or end was interrupted is on its way to somewhere."""
        assert eventually(lambda: self._node.unlink(self._port, 1) == SUCCESS)
        assert eventually(lambda: self._node.link(self._port, 1) == SUCCESS)


def run(
    node: Node,
    path: str,
    port: int,
    names: list[str],
    count: int,
    seed: int = 1,
    *,
    counts_threads: bool = False,
) -> Found:
    """In a process of its own: interruptions, and what is left of them when all has ended."""
    tasks = threads()
    node.start(LLMRole.DECODER, 2, **settings(path))  # what is opened once is open then
    node.stop()
    before = descriptors(), tasks if counts_threads else 1000
    victim = Victim(node, path, port)
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
