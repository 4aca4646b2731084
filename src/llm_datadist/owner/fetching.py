"""Fetching: a push of a peer's, carried out by us, who receive it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.core.plan import NOTHING
from llm_datadist.core.remote import Guard
from llm_datadist.core.segments import Segments
from llm_datadist.observe.watch import Watch
from llm_datadist.running.bell import Bell
from llm_datadist.running.deadline import Deadline

if TYPE_CHECKING:
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.owner.answers import Answers
    from llm_datadist.peer.peer import Peer
    from llm_datadist.running.gate import Gate


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """A push that a peer asks for."""

    request: m.Fetch
    segments: Segments
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
        ProtocolError.
        """
        timeout_s = min(request.timeout_ms / 1000, self._timeout_s)
        segments = Segments(*m.columns_of(request.columns, 3))
        arrival = Arrival(request, segments, Deadline.after(timeout_s))
        self._arrived[arrival] = None
        return arrival

    def depart(self, arrival: Arrival) -> None:
        """The push is over, or will not be. May be called again."""
        self._arrived.pop(arrival, None)
        self._bell.ring()

    def fetch(self, arrival: Arrival, peer: Peer) -> m.Message:
        """Reads what the peer pushes into a cache of ours. Raises LLMException."""
        if self._recorder is None:
            self._fetch(arrival, peer)
        else:
            series = self._recorder.series("fetch", peer.cluster_id, peer.path)
            with Watch(series) as watch:
                watch.moves(arrival.segments)
                self._fetch(arrival, peer)
        return m.Done()

    def _fetch(self, arrival: Arrival, peer: Peer) -> None:
        request, segments, deadline = arrival.request, arrival.segments, arrival.deadline
        ticket = Guard(request.src_cache_id, request.src_generation, request.src_word_addr)
        with self._gate.passing() as token:
            self._gate.enter(token, peer.door)
            ours = self._answers.writable(token, request, segments.dst, segments.nbytes)
            self._wait_for_earlier(arrival, deadline)
            # stale, when it was asked long ago: by the sender's word, since clocks are not compared
            peer.read(NOTHING, ticket, ours, deadline)
            peer.read(segments, ticket, ours, deadline)

    def _wait_for_earlier(self, arrival: Arrival, deadline: Deadline) -> None:
        """An earlier push to the same bytes may have failed at its sender, and still be under way.

        What is told to have arrived must not be overwritten by that. Raises LLM_TIMEOUT.
        """
        left_s = deadline.require("a push by the peer")
        if not self._bell.wait_until(lambda: not self._is_behind(arrival), left_s):
            raise deadline.expired("waiting for an earlier push to the same blocks")

    def _is_behind(self, arrival: Arrival) -> bool:
        for other in tuple(self._arrived):
            if other is arrival:
                return False
            if other.segments.overlap(arrival.segments):
                return True
        return False
