"""Connections: the links of one engine, by the names of its peers.

A connection is the caller's own: it alone connects and disconnects. The engine that was called may
use the same link, by the caller's name. What a table says may have ended meanwhile, so it is asked
of the links each time; only which peer a name led to last is kept.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.hixl.call import Exhausted
from llm_datadist.links.linker import Target
from llm_datadist.running.deadline import Deadline

if TYPE_CHECKING:
    from llm_datadist.cluster import Cluster
    from llm_datadist.hixl.names import EngineName
    from llm_datadist.hixl.options import EngineOptions
    from llm_datadist.links.session import Session
    from llm_datadist.peer.peer import Peer

#: how long the end of an idle connection may take
_IDLE_S: Final = 1.0
#: what still moves behind a connection that was cut is waited for so long: one system call
_LAST_S: Final = 3.0
_OK: Final = LLMStatusCode.LLM_SUCCESS


class Connections:
    """Those of one engine. Thread-safe."""

    def __init__(self, cluster: Cluster, options: EngineOptions) -> None:
        self._cluster = cluster
        self._links = cluster.links
        self._gate = cluster.gate
        self.connect_themselves = options.connects_itself
        self._channels = options.channels
        self._peers: dict[EngineName, Peer] = {}
        #: by address, when each was used last
        self._used: dict[object, int] = {}
        self._clock = itertools.count(1)
        #: calls that are making one
        self._making: dict[object, None] = {}

    def connect(self, name: EngineName, timeout_s: float) -> None:
        """Raises LLMException: LLM_ALREADY_LINK, LLM_TIMEOUT, LLM_PARAM_INVALID, LLM_LINK_FAILED.

        And Exhausted for more connections than there may be.
        """
        endpoint = name.endpoint
        if self._links.peer_at(endpoint) is not None:
            raise LLMException(
                f"{name} is connected already: disconnect first", LLMStatusCode.LLM_ALREADY_LINK
            )
        making, deadline = object(), Deadline.after(timeout_s)
        try:
            self._making[making] = None
            self._make_room(timeout_s)
            left_s = max(0.001, deadline.remaining_s())
            outcome = self._cluster.link([Target(None, (endpoint,))], left_s)[0]
        finally:
            self._making.pop(making, None)
        if outcome.status is not _OK:
            own_id, hint = self._cluster.cluster_id, ""
            if str(own_id) in outcome.reason:
                hint = f" (the name of this engine makes its cluster id, {own_id})"
            raise LLMException(f"{name}: {outcome.reason}{hint}", outcome.status)
        self._used[endpoint] = next(self._clock)

    def disconnect(self, name: EngineName, timeout_s: float) -> None:
        """Ends the connection, and what is moved over it. Nothing is moved any more then.

        Raises LLMException: LLM_NOT_YET_LINK when there is none of our own, LLM_TIMEOUT when the
        peer did not agree in time; the connection has ended all the same.
        """
        peer = self._links.peer_at(name.endpoint)
        if peer is None:
            raise self._missing(name)
        self._gate.shut(peer.door, "the connection was ended by disconnect")
        self._gate.cut(peer.door)
        target = Target(None, (name.endpoint,))
        outcome = self._cluster.unlink([target], timeout_s, force=False)[0]
        if outcome.status is not _OK:
            self._cluster.unlink([target], timeout_s, force=True)
        self._gate.drain(peer.door, _LAST_S)
        if outcome.status is not _OK:
            raise LLMException(
                f"{name} did not agree within {timeout_s:.3f} s; the connection was cut",
                outcome.status,
            )

    def is_connected(self, name: EngineName) -> bool:
        """Whether we have called that engine, and the connection lives."""
        return self._links.peer_at(name.endpoint) is not None

    def require_or_make(self, name: EngineName) -> None:
        """That there is a connection, or will be. Raises LLMException(LLM_NOT_YET_LINK)."""
        can_be_made = self.connect_themselves and name.port is not None
        if not can_be_made and self._find(name) is None:
            raise self._missing(name)

    def require(self, name: EngineName, deadline: Deadline) -> Peer:
        """The engine of that name, connected to if need be and transfers do that by themselves.

        Raises LLMException: LLM_NOT_YET_LINK, and as `connect` does.
        """
        peer = self._find(name)
        if peer is not None and not (self.connect_themselves and peer.door.shut_because):
            return peer
        if not self.connect_themselves or name.port is None:
            raise self._missing(name)
        if peer is not None:  # it is being ended, as an idle one
            left_s = max(0.001, min(_IDLE_S, deadline.remaining_s()))
            self._cluster.unlink([Target(None, (name.endpoint,))], left_s, force=False)
        try:
            self.connect(name, deadline.require(f"connecting to {name}"))
        except LLMException as error:  # another thread was quicker
            if error.status_code is not LLMStatusCode.LLM_ALREADY_LINK:
                raise
        peer = self._find(name)
        if peer is None:
            raise self._missing(name)
        return peer

    def _find(self, name: EngineName) -> Peer | None:
        peer = self._peers.get(name)
        if peer is None or peer.is_gone:
            if name.port is not None:
                peer = self._links.peer_at(name.endpoint)
            if peer is None or peer.is_gone:
                self._peers.pop(name, None)
                return self._caller(name)
            self._peers[name] = peer
        if self._channels is not None:
            self._used[name.endpoint] = next(self._clock)
        return peer

    def _caller(self, name: EngineName) -> Peer | None:
        """The engine of that name, if it has called us."""
        try:
            return self._links.find(name.cluster_id)
        except LLMException:
            return None

    def _missing(self, name: EngineName) -> LLMException:
        return LLMException(
            f"there is no connection to {name}: call connect first, or set AutoConnect; the log "
            "says why one ended",
            LLMStatusCode.LLM_NOT_YET_LINK,
        )

    def _make_room(self, timeout_s: float) -> None:
        """For one more connection, which is counted already. Raises Exhausted."""
        channels = self._channels
        if channels is None:
            return
        own = [session for session in self._links.all() if session.is_caller]
        count = len(own) + len(self._making)
        if channels.high is not None and count > channels.high:
            self._end_idle(own, count - max(1, channels.low), min(_IDLE_S, timeout_s))
        count = sum(session.is_caller for session in self._links.all()) + len(self._making)
        if count > channels.max_channel:
            raise Exhausted(
                f"channel_pool.max_channel allows {channels.max_channel} connections, and all of "
                "them are in use"
            )

    def _end_idle(self, own: list[Session], most: int, timeout_s: float) -> None:
        """The connections that were not used for the longest time, if nothing runs on them."""
        own.sort(key=lambda session: self._used.get(session.endpoint, 0))
        targets: list[Target] = []
        for session in own:
            if session.endpoint is None or session.num_running or len(targets) >= most:
                continue
            self._gate.shut(session.door, "the connection was idle, and others were needed")
            if self._gate.count(session.door):  # not any more
                self._gate.open(session.door)
                continue
            targets.append(Target(None, (session.endpoint,)))
            self._used.pop(session.endpoint, None)
        if not targets:
            return
        outcomes = self._cluster.unlink(targets, timeout_s, force=False)
        pairs = zip(targets, outcomes, strict=True)
        late = [target for target, outcome in pairs if outcome.status is not _OK]
        if late:
            self._cluster.unlink(late, timeout_s, force=True)
