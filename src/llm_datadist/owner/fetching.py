"""Fetching: a push of a peer's, carried out by us, who receive it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.core.combs import overlap
from llm_datadist.core.fetches import pieces_of
from llm_datadist.core.plan import NOTHING
from llm_datadist.core.remote import Guard
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.observe.watch import Watch
from llm_datadist.running.bell import Bell
from llm_datadist.running.deadline import Deadline

if TYPE_CHECKING:
    from llm_datadist.core.combs import Pieces
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.owner.answers import Answers
    from llm_datadist.peer.peer import Peer
    from llm_datadist.running.gate import Gate


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """A push that a peer asks for."""

    request: m.Fetch
    pieces: Pieces
    deadline: Deadline


class Fetching:
    """Does what peers' `Peer.send` asks for. Thread-safe."""

    def __init__(
        self, answers: Answers, gate: Gate, recorder: Recorder | None, timeout_s: float
    ) -> None:
        self._answers = answers
        self._gate = gate
        self._recorder = recorder
        #: no peer keeps a cache of ours for longer
        self._timeout_s = timeout_s
        self._bell = Bell()
        #: what is written now, or waits for its turn: in the order in which it came
        self._arrived: dict[Arrival, None] = {}

    def arrive(self, request: m.Fetch) -> Arrival:
        """A push was asked for: it has its place from here on. `depart` must follow.

        In the loop's thread, so that the order is that in which the requests came. Raises
        ProtocolError, and LLMException for one that reaches where it must not: later pushes wait
        for those that have a place.
        """
        pieces = pieces_of(request)
        with self._gate.passing() as token:
            self._answers.writable(token, request, pieces)
        arrival = Arrival(request, pieces, self.deadline_of(request.timeout_ms))
        self._arrived[arrival] = None
        return arrival

    def deadline_of(self, timeout_ms: int) -> Deadline:
        """Of what a peer asks us to do: at most as long as calls of our own may take."""
        return Deadline.after(min(timeout_ms / 1000, self._timeout_s))

    def depart(self, arrival: Arrival) -> None:
        """The push is over, or will not be. May be called again."""
        self._arrived.pop(arrival, None)
        self._bell.ring()

    def look(self) -> None:
        """A link has ended: pushes of its peer that wait are over."""
        self._bell.ring()

    def fetch(self, arrival: Arrival, peer: Peer) -> m.Message:
        """Reads what the peer pushes into a cache of ours. Raises LLMException."""
        if self._recorder is None:
            self._fetch(arrival, peer)
        else:
            series = self._recorder.series("fetch", peer.cluster_id, peer.path)
            with Watch(series) as watch:
                watch.moves(arrival.pieces)
                self._fetch(arrival, peer)
        return m.Done()

    def _fetch(self, arrival: Arrival, peer: Peer) -> None:
        request, pieces = arrival.request, arrival.pieces
        ticket = Guard(request.src_cache_id, request.src_generation, request.src_word_addr)
        with self._gate.passing() as token:
            deadline = arrival.deadline._replace(token=token)
            self._gate.enter(token, peer.door)
            ours = self._answers.writable(token, request, pieces)
            self._wait_for_earlier(arrival, peer, deadline)
            # stale, when it was asked long ago: by the sender's word, since clocks are not compared
            peer.read(NOTHING, ticket, ours, deadline)
            peer.read(pieces, ticket, ours, deadline)

    def _wait_for_earlier(self, arrival: Arrival, peer: Peer, deadline: Deadline) -> None:
        """An earlier push to the same bytes may have failed at its sender, and still be under way.

        What is told to have arrived must not be overwritten by that. Raises LLMException:
        LLM_TIMEOUT, LLM_NOT_YET_LINK.
        """
        left_s = deadline.require("a push by the peer")
        earlier = self._earlier(arrival)

        def is_over() -> bool:
            return peer.is_gone or self._arrived.keys().isdisjoint(earlier)

        if not self._bell.wait_until(is_over, left_s):
            raise deadline.expired("waiting for an earlier push to the same blocks")
        if peer.is_gone:
            raise LLMException("the link has ended", LLMStatusCode.LLM_NOT_YET_LINK)

    def _earlier(self, arrival: Arrival) -> set[Arrival]:
        """The pushes to the same bytes that came before: looked for once, it takes its time."""
        before = itertools.takewhile(lambda other: other is not arrival, list(self._arrived))
        return {other for other in before if overlap(other.pieces, arrival.pieces)}
