"""The leases that requests of ours wait for: renewed in time, whatever the engine does meanwhile.

Each is renewed by its own duration, by a thread that sleeps until the next one is due. What is said
of a lease is written into words of its producer's memory, and what a hand-over says of itself may
be made up: so the slot is looked at first, each time, and nothing is written to one that is
another's.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from llm_datadist import LLMStatusCode
from llm_datadist.integrations.vllm.producers import AnotherEngine

if TYPE_CHECKING:
    from llm_datadist.integrations.vllm.board import Board
    from llm_datadist.integrations.vllm.handover import Handover
    from llm_datadist.integrations.vllm.producers import Producer, Producers

logger = logging.getLogger(__name__)

#: how often a waiting request is mentioned to its producer in the time of a lease
_BEATS_PER_LEASE = 6
#: and how often at most and at least, whatever a hand-over says
_SHORTEST_S, _LONGEST_S = 0.05, 600.0

_Key: TypeAlias = tuple[object, ...]


@dataclass(eq=False)
class _Wait:
    source: Handover
    due: float
    #: whether it was on its board once
    is_seen: bool = False
    #: a thread has it, or will: one that hangs is not asked again
    is_asked: bool = False

    @property
    def interval_s(self) -> float:
        return min(max(self.source.remote_lease_s / _BEATS_PER_LEASE, _SHORTEST_S), _LONGEST_S)


class Leases:
    """Keeps them from `expect` to `release`. Nothing blocks. Thread-safe."""

    def __init__(self, board: Board, producers: Producers) -> None:
        self._board, self._producers = board, producers
        # taken by `with`, not the condition, whose own code a signal's handler may raise in
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._is_closed = False
        self._waits: dict[_Key, _Wait] = {}
        threading.Thread(target=self._run, name="kv-leases", daemon=True).start()

    def expect(self, source: Handover, *, is_read_now: bool) -> None:
        """Somebody waits for it from now on. One that is read now has some time."""
        wait = _Wait(source, time.monotonic())
        if is_read_now:
            wait.due += wait.interval_s
        with self._lock:
            self._waits.setdefault(_key_of(source), wait)
            self._changed.notify_all()

    def release(self, source: Handover) -> None:
        """Nobody does any more. Its producer is told, if it is linked: else the lease will end."""
        self._forget(source)
        producer = self._producers.reached(source)
        if producer is None:
            return
        try:
            producer.words.put(partial(self._release, producer, source))
        except Exception as error:
            _could_not_tell(source, error)

    def close(self) -> None:
        """Renews nothing any more."""
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while waits := self._next_due():
            for key in {_address_of(wait) for wait in waits}:
                self._begin_renewal([wait for wait in waits if _address_of(wait) == key])

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
        source = waits[0].source
        try:
            is_seen = any(wait.is_seen for wait in waits)
            find = self._producers.reach if is_seen else self._producers.reach_again
            if producer := find(source):
                producer.words.put(partial(self._renew, producer, waits))
                return
        except Exception as error:  # the pull will say so, if it matters
            _could_not_tell(source, error)
        self._asked(waits)

    def _renew(self, producer: Producer, waits: list[_Wait]) -> None:
        try:
            leases = [wait.source.remote_lease for wait in waits if self._stands(producer, wait)]
            if leases:
                self._board.renew(producer.link.result(), leases)
        except Exception as error:  # as above
            _could_not_tell(waits[0].source, error)
        finally:
            self._asked(waits)

    def _stands(self, producer: Producer, wait: _Wait) -> bool:
        """Whether the lease is on its board. One that is not is forgotten."""
        source = wait.source
        try:
            cluster_id = self._producers.cluster_of(producer, source)
            if self._board.key_of(cluster_id, source.remote_lease) is not None:
                wait.is_seen = True
                return True
        except AnotherEngine:
            pass
        except Exception as error:  # of this one alone: the others are renewed
            _could_not_tell(source, error)
            if getattr(error, "status_code", None) is not LLMStatusCode.LLM_PARAM_INVALID:
                return False  # no answer, and not that there is no such slot
        self._forget(source)
        return False

    def _release(self, producer: Producer, source: Handover) -> None:
        try:
            cluster_id = self._producers.cluster_of(producer, source)
            if self._board.key_of(cluster_id, source.remote_lease) is not None:
                self._board.release(cluster_id, [source.remote_lease])
        except Exception as error:
            _could_not_tell(source, error)

    def _asked(self, waits: list[_Wait]) -> None:
        with self._lock:
            for wait in waits:
                wait.is_asked = False
            self._changed.notify_all()

    def _forget(self, source: Handover) -> None:
        with self._lock:
            self._waits.pop(_key_of(source), None)


def _key_of(source: Handover) -> _Key:
    return (source.remote_host, source.remote_port, source.remote_engine_id, source.remote_lease)


def _address_of(wait: _Wait) -> _Key:
    return (wait.source.remote_host, wait.source.remote_port)


def _could_not_tell(source: Handover, error: Exception) -> None:
    logger.info("%s could not be told: %s", source.remote_engine_id, error)
