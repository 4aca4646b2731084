"""The leases that requests of ours wait for: renewed in time, whatever the engine does meanwhile.

Each is renewed by its own duration, by a thread that sleeps until the next one is due. One that
could not be, since its producer cannot be linked or its link was cut, is tried again soon, until it
has lasted as long as it can without a word. What is said
of a lease is written into words of its producer's memory, and what a hand-over says of itself may
be made up: so the slot is looked at first, each time, and nothing is written to one that is
another's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.integrations.vllm.linking import AnotherEngine, Misfit
from llm_datadist.integrations.vllm.printable import printable

if TYPE_CHECKING:
    from llm_datadist.integrations.vllm.board import Board
    from llm_datadist.integrations.vllm.handover import Handover, Lease
    from llm_datadist.integrations.vllm.producers import Producer, Producers
    from llm_datadist.integrations.vllm.ranks import Origin

logger = logging.getLogger(__name__)

#: how often a waiting request is mentioned to its producer in the time of a lease
_BEATS_PER_LEASE = 6
#: and how often at most and at least, whatever a hand-over says
_SHORTEST_S, _LONGEST_S = 0.05, 600.0
#: so much sooner is one tried again that could not be renewed
_TRIES_PER_BEAT = 3

_Key: TypeAlias = tuple[object, ...]


@dataclass(eq=False)
class _Wait:
    origin: Origin[Handover]
    due: float
    #: when it was last known to stand, or to be said to
    stood_at: float
    #: a thread has it, or will: one that hangs is not asked again
    is_asked: bool = False

    @property
    def lease(self) -> Lease:
        return self.origin.source.remote_lease

    @property
    def lease_s(self) -> float:
        return self.origin.source.remote_lease_s

    @property
    def interval_s(self) -> float:
        return min(max(self.lease_s / _BEATS_PER_LEASE, _SHORTEST_S), _LONGEST_S)


class Leases:
    """Keeps them from `expect` to `release`. Nothing blocks. Thread-safe.

    A lease is forgotten when it is not on its board, when its producer turns out to be another
    engine, or one that does not fit, and when it was not heard of for its duration.
    """

    def __init__(self, board: Board, producers: Producers) -> None:
        self._board, self._producers = board, producers
        # taken by `with`, not the condition, whose own code a signal's handler may raise in
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._is_closed = False
        self._waits: dict[_Key, _Wait] = {}
        threading.Thread(target=self._run, name="kv-leases", daemon=True).start()

    def expect(self, origin: Origin[Handover], *, is_read_now: bool) -> None:
        """Somebody waits for it from now on. One that is read now has some time."""
        now = time.monotonic()
        wait = _Wait(origin, now, now)
        if is_read_now:
            wait.due += wait.interval_s
        with self._lock:
            self._waits.setdefault(_key_of(origin), wait)
            self._changed.notify_all()

    def release(self, origin: Origin[Handover]) -> None:
        """Nobody does any more. Its producer is told, if it is linked: else the lease will end."""
        self._forget(origin)
        producer = self._producers.reached(origin)
        if producer is None:
            return
        try:
            producer.words.put(partial(self._release, producer, origin))
        except Exception as error:
            _could_not_tell(origin, error)

    def close(self) -> None:
        """Renews nothing any more."""
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while waits := self._next_due():
            by_worker = defaultdict(list)
            for wait in waits:
                by_worker[wait.origin.key].append(wait)
            for some in by_worker.values():
                self._begin_renewal(some)

    def _next_due(self) -> list[_Wait]:
        """Waits until some are to be renewed; none when we are closed."""
        with self._lock:
            while not self._is_closed:
                now = time.monotonic()
                idle = [wait for wait in self._waits.values() if not wait.is_asked]
                if any(wait.due <= now for wait in idle):
                    # and those that are soon to be, so that they come together the next time
                    waits = [wait for wait in idle if wait.due <= now + wait.interval_s / 3]
                    for wait in waits:
                        wait.is_asked, wait.due = True, now + wait.interval_s
                    return waits
                first = min((wait.due for wait in idle), default=None)
                self._changed.wait(first and first - now)
            return []

    def _begin_renewal(self, waits: list[_Wait]) -> None:
        try:
            producer = self._producers.reach(waits[0].origin)
            producer.words.put(partial(self._renew, producer, waits))
        except Exception as error:  # the pull will say so, if it matters
            self._not_renewed(waits, error)

    def _renew(self, producer: Producer, waits: list[_Wait]) -> None:
        begun = time.monotonic()
        try:
            self._producers.await_link(producer)
            standing = self._standing(producer, waits)
            if standing:
                self._board.renew(producer.cluster_id, [wait.lease for wait in standing])
        except Exception as error:  # as above
            self._not_renewed(waits, error)
        else:
            for wait in standing:
                wait.stood_at = begun
            self._asked(waits)

    def _standing(self, producer: Producer, waits: list[_Wait]) -> list[_Wait]:
        """Those whose leases are on the board; others are forgotten. Raises as `Board.keys_of`."""
        try:
            leases = [wait.lease for wait in waits]
            keys = self._board.keys_of(producer.cluster_id, leases)
        except LLMException as error:
            if error.status_code is not LLMStatusCode.LLM_PARAM_INVALID:
                raise
            if len(waits) > 1:  # there is no such slot as one of them names
                middle = len(waits) // 2
                return [
                    *self._standing(producer, waits[:middle]),
                    *self._standing(producer, waits[middle:]),
                ]
            keys = [None]
        for wait, key in zip(waits, keys, strict=True):
            if key is None:
                self._forget(wait.origin)
        return [wait for wait, key in zip(waits, keys, strict=True) if key is not None]

    def _not_renewed(self, waits: list[_Wait], error: Exception) -> None:
        """They are tried again, as long as there is hope."""
        _could_not_tell(waits[0].origin, error)
        now = time.monotonic()
        for wait in waits:
            wait.due = now + max(wait.interval_s / _TRIES_PER_BEAT, _SHORTEST_S)
            is_over = now > wait.stood_at + wait.lease_s
            if is_over or isinstance(error, AnotherEngine | Misfit):
                self._forget(wait.origin)
        self._asked(waits)

    def _release(self, producer: Producer, origin: Origin[Handover]) -> None:
        lease = origin.source.remote_lease
        try:
            self._producers.await_link(producer)
            if self._board.key_of(producer.cluster_id, lease) is not None:
                self._board.release(producer.cluster_id, [lease])
        except Exception as error:
            _could_not_tell(origin, error)

    def _asked(self, waits: list[_Wait]) -> None:
        with self._lock:
            for wait in waits:
                wait.is_asked = False
            self._changed.notify_all()

    def _forget(self, origin: Origin[Handover]) -> None:
        with self._lock:
            self._waits.pop(_key_of(origin), None)


def _key_of(origin: Origin[Handover]) -> _Key:
    return (*origin.key, origin.source.remote_lease)


def _could_not_tell(origin: Origin[Handover], error: Exception) -> None:
    logger.info("%s could not be told: %s", origin.source.remote_engine_id, printable(error))
