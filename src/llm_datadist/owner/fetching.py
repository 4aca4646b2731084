"""Fetching: a push of a peer's, carried out by us, who receive it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.core.remote import Guard
from llm_datadist.core.segments import Segments
from llm_datadist.observe.watch import Watch
from llm_datadist.owner.answers import MAX_ANSWER_S
from llm_datadist.running.deadline import Deadline

if TYPE_CHECKING:
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.owner.answers import Answers
    from llm_datadist.peer.peer import Peer
    from llm_datadist.running.gate import Gate


class Fetching:
    """Does what peers' `Peer.send` asks for. Thread-safe."""

    def __init__(self, answers: Answers, gate: Gate, recorder: Recorder | None) -> None:
        self._answers = answers
        self._gate = gate
        self._recorder = recorder

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
        timeout_s = min(request.timeout_ms / 1000, MAX_ANSWER_S)
        deadline = Deadline.after(timeout_s)
        if peer.path == "cma":  # one host, one clock: what was asked long ago is seen to be late
            deadline = Deadline(min(deadline.at, request.deadline_at), timeout_s)
        guard = Guard(request.src_cache_id, request.src_generation, request.src_word_addr)
        with self._gate.passing() as token:
            self._gate.enter(token, peer.door)
            ours = self._answers.writable(token, request, segments.dst, segments.nbytes)
            deadline.require("a push by the peer")
            peer.read(segments, guard, ours, deadline)
