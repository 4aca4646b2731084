"""Fetching: a push of a peer's, carried out by us, who receive it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.core.remote import Guard
from llm_datadist.core.segments import Segments
from llm_datadist.observe.watch import Watch
from llm_datadist.running.bell import Bell
from llm_datadist.running.deadline import Deadline

if TYPE_CHECKING:
    from llm_datadist.core.registry import Entry
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.owner.answers import Answers
    from llm_datadist.peer.peer import Peer
    from llm_datadist.running.gate import Gate


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
        self._writing: dict[object, tuple[Entry, Segments]] = {}

    def fetch(self, request: m.Fetch, peer: Peer) -> m.Message:
        """Reads what the peer pushes into a cache of ours. Raises LLMException, ProtocolError."""
        src, dst, nbytes = m.columns_of(request.columns, 3)
        segments = Segments(src, dst, nbytes)
        if self._recorder is None:
            self._fetch(request, segments, peer)
        else:
            series = self._recorder.series("fetch", peer.cluster_id, peer.path)
            with Watch(series) as watch:
                watch.moves(segments)
                self._fetch(request, segments, peer)
        return m.Done()

    def _fetch(self, request: m.Fetch, segments: Segments, peer: Peer) -> None:
        timeout_s = min(request.timeout_ms / 1000, self._timeout_s)
        deadline = Deadline.after(timeout_s)
        if peer.path == "cma":  # one host, one clock: what was asked long ago is seen to be late
            deadline = Deadline(min(deadline.at, request.deadline_at), timeout_s)
        guard = Guard(request.src_cache_id, request.src_generation, request.src_word_addr)
        with self._gate.passing() as token:
            self._gate.enter(token, peer.door)
            ours = self._answers.writable(token, request, segments.dst, segments.nbytes)
            self._writing[token] = ours, segments
            try:
                self._wait_for_earlier(token, deadline)
                peer.read(segments, guard, ours, deadline)
            finally:
                del self._writing[token]
                self._bell.ring()

    def _wait_for_earlier(self, token: object, deadline: Deadline) -> None:
        """An earlier push to the same bytes may have failed at its sender, and still be under way.

        What is told to have arrived must not be overwritten by that. Raises LLM_TIMEOUT.
        """
        left_s = deadline.require("a push by the peer")
        if not self._bell.wait_until(lambda: not self._is_behind(token), left_s):
            raise deadline.expired("waiting for an earlier push to the same blocks")

    def _is_behind(self, token: object) -> bool:
        ours, mine = self._writing[token]
        for other, (cache, segments) in tuple(self._writing.items()):
            if other is token:
                return False
            if cache is ours and segments.overlap(mine):
                return True
        return False
