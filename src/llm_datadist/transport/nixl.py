"""NIXL with UCX: fast networks (RDMA), and whatever else an installed NIXL reaches.

Each cluster has one agent that owns: peers read its memory through it. Each link has an agent of
its own that reads, so that a read which fails or is late is ended for good with that agent: UCX has
no other way to be sure that nothing arrives later. The next read begins with a new one, which is
also how a peer that was lost comes back.
"""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.core import messages as m
from llm_datadist.core.generations import STALE, WORD_NBYTES
from llm_datadist.core.segments import Segments
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.locks import make_lock
from llm_datadist.memory.device import HOST
from llm_datadist.observe.log import get_logger
from llm_datadist.running.bell import WAKE, Turns
from llm_datadist.transport import ucx
from llm_datadist.transport.base import Channel, Region, StaleCache, Streams
from llm_datadist.transport.nixl_agent import Agent, package

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.remote import Guard
    from llm_datadist.core.segments import U64
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.running.movers import Movers

#: one request to NIXL moves at most this much, so that a deadline is looked at in time
_CALL_NBYTES = 64 * 1024 * 1024
#: a reader that has learned of so many caches forgets which, and asks again
_MOST_KNOWN = 65536


def is_worthwhile() -> bool:
    """Whether NIXL is installed and has a network here that our own TCP cannot use.

    UCX is asked only where a port is up, which takes a third of a second.
    """
    name = package()
    if name is None or not ucx.has_active_port():
        return False
    found = ucx.ask(name)
    if not found.rdma:
        get_logger().warning(
            "links do without nixl: a port of an RDMA device is up, and UCX sees no device; "
            "llm-datadist doctor says why"
        )
    return bool(found.rdma) and not found.failure


class NixlTransport:
    """NIXL's agents of a cluster. Thread-safe."""

    name = "nixl"
    asks_owner = False
    may_wait = True
    reaches = frozenset({HOST})

    def __init__(self, movers: Movers) -> None:
        """Raises LLMException: LLM_PARAM_INVALID where NIXL is not installed, LLM_FAILED."""
        if package() is None:
            raise invalid(
                "the path nixl needs NIXL: pip install --no-deps nixl-cu12, beside torch and numpy"
            )
        self._threads = movers.threads
        self._owner = Agent(f"owner-{secrets.token_hex(8)}", serves=True)
        self._lock = make_lock()
        #: what is exposed: our readers read into it, and peers read it by the owner's registration
        self._regions: dict[Region, object] = {}

    def offer(self) -> bytes | None:
        return self._owner.address()

    def open(self, offer: bytes, streams: Streams) -> Channel:
        return NixlChannel(self, offer, streams)

    def expose(self, region: Region) -> None:
        # outside the lock, which nobody shall wait for: registering may take long
        registered = None
        if region.is_remote_accessible:
            registered = self._owner.register(region.addrs, region.nbytes)
        with self._lock:
            self._regions[region] = registered

    def conceal(self, region: Region) -> None:
        with self._lock:
            registered = self._regions.pop(region, None)
        if registered is not None:
            self._owner.deregister(registered)

    def exports(self) -> bytes:
        return self._owner.metadata()

    def regions(self) -> set[Region]:
        """All that is exposed now, the caches that peers may not read included."""
        with self._lock:
            return set(self._regions)

    def new_reader(self) -> Agent:
        name = f"reader-{secrets.token_hex(8)}"
        return Agent(name, threads=self._threads, serves=False)

    def close(self) -> None:
        with self._lock:
            self._regions.clear()
            self._owner.close()


class NixlChannel:
    """Reads one peer's memory, one transfer after the other. Thread-safe."""

    def __init__(self, transport: NixlTransport, offer: bytes, streams: Streams) -> None:
        self._transport = transport
        self._offer = offer
        self._streams = streams
        #: guards all below
        self._turns = Turns()
        self._reader: Reader | None = None
        self._is_closed = False

    def read(self, pieces: Pieces, guard: Guard, deadline: Deadline) -> None:
        segments = pieces.flat()
        turn, ringing = object(), map(WAKE, self._turns.bell.waiting)

        def go_on() -> None:
            deadline.require("the transfer")
            self._require_open()

        try:
            self._turns.take(turn, deadline, "waiting for other transfers of the link")
            reader = self._ready()
            reader.register(segments.dst, go_on)
            reader.learn(guard, self._streams, deadline)
            with self._dropped_on_failure():
                reader.require(guard, go_on)
                for window in _windows(segments):
                    reader.read(window, go_on)
                reader.require(guard, go_on)
        finally:  # as `Turns.leave`, which a signal could come before: each of these is one step
            try:
                self._turns.calls.pop(turn, None)
            finally:
                any(ringing)
            if self._is_closed:
                self.close()

    def close(self) -> None:
        self._is_closed = True  # whoever reads sees it soon, and then closes
        turn = object()
        try:
            if self._turns.take_now(turn):
                self._drop()
        finally:
            self._turns.leave(turn)

    def _require_open(self) -> None:
        if self._is_closed:
            raise LLMException("the link has ended", LLMStatusCode.LLM_NOT_YET_LINK)

    def _ready(self) -> Reader:
        self._require_open()
        if self._reader is None:
            self._reader = Reader(self._transport, self._offer)
        return self._reader

    @contextmanager
    def _dropped_on_failure(self) -> Iterator[None]:
        """A reader that failed is ended: what it began could still arrive."""
        try:
            yield
        except StaleCache:
            raise
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None


class Reader:
    """An agent that knows one peer's, and where both ends' memory is."""

    def __init__(self, transport: NixlTransport, offer: bytes) -> None:
        self._transport = transport
        self._word = np.zeros(1, dtype=np.uint64)
        self._agent = transport.new_reader()
        self._agent.register([self._word.ctypes.data], WORD_NBYTES)
        self._peer = self._agent.load(offer)
        self._registered: dict[Region, object] = {}
        self._known: set[tuple[int, int]] = set()

    def register(self, dst: U64, go_on: Callable[[], None]) -> None:
        """Registers the memory of this process that is read into, and lets go of what is gone."""
        current = self._transport.regions()
        for region in self._registered.keys() - current:
            self._agent.deregister(self._registered.pop(region))
        addrs = np.sort(dst)
        for region in current - self._registered.keys():
            if _has_any(region, addrs):
                go_on()
                self._registered[region] = self._agent.register(region.addrs, region.nbytes)

    def learn(self, guard: Guard, streams: Streams, deadline: Deadline) -> None:
        """Asks where the peer's cache is, if it is new."""
        cache = (guard.cache_id, guard.generation)
        if cache in self._known:
            return
        with streams.borrow(deadline) as stream:
            answer = stream.ask(m.ListExports(NixlTransport.name), deadline)
        if not isinstance(answer, m.Exports):
            raise LLMException(f"the peer answered {answer!r:.200}", LLMStatusCode.LLM_FAILED)
        self._agent.load(answer.exports)
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known.add(cache)

    def require(self, guard: Guard, go_on: Callable[[], None]) -> None:
        """Raises StaleCache unless the guard holds now."""
        word = np.array([guard.word_addr], dtype=np.uint64)
        landing = np.array([self._word.ctypes.data], dtype=np.uint64)
        nbytes = np.array([WORD_NBYTES], dtype=np.uint64)
        self._word[0] = STALE
        self.read(Segments(word, landing, nbytes), go_on)
        if self._word[0] != guard.generation:
            raise StaleCache(guard)

    def read(self, segments: Segments, go_on: Callable[[], None]) -> None:
        self._agent.read(self._peer, segments, go_on)

    def close(self) -> None:
        self._agent.close()


def _has_any(region: Region, addrs: U64) -> bool:
    """Whether one of the addresses, which are sorted, lies in the region."""
    starts = np.array(region.addrs, dtype=np.uint64)
    first, behind = (
        np.searchsorted(addrs, edges) for edges in (starts, starts + np.uint64(region.nbytes))
    )
    return bool((first < behind).any())


def _windows(segments: Segments) -> Iterator[Segments]:
    """In order, each of at most as many bytes as one request moves."""
    bounded = segments.bounded(_CALL_NBYTES)
    ends = np.cumsum(bounded.nbytes)
    start = 0
    while start < len(bounded):
        base = int(ends[start] - bounded.nbytes[start])
        stop = int(np.searchsorted(ends, np.uint64(base + _CALL_NBYTES), side="right"))
        yield bounded.slice(start, stop)
        start = stop
