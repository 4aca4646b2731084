"""Connections: the links of one engine, by the names of its peers.

A connection is the caller's own: it alone connects and disconnects. The engine that was called may
use the same link, by the caller's name. What a table says may have ended meanwhile, so it is asked
of the links each time; only which peer a name led to last is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.hixl.pool import IDLE_S, Pool
from llm_datadist.links.linker import Target
from llm_datadist.running.deadline import Deadline
from llm_datadist.transfers.by_address import NotBegun

if TYPE_CHECKING:
    from llm_datadist.cluster import Cluster
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.hixl.names import EngineName
    from llm_datadist.hixl.options import EngineOptions
    from llm_datadist.links.linker import Outcome
    from llm_datadist.peer.peer import Peer

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
        self.pool = Pool(cluster, options.channels)
        self._peers: dict[EngineName, Peer] = {}
        #: what `disconnect` ends; left here when that was interrupted
        self._leaving: dict[Endpoint, Peer] = {}

    def connect(self, name: EngineName, timeout_s: float) -> None:
        """Raises LLMException: LLM_ALREADY_LINK, LLM_TIMEOUT, LLM_PARAM_INVALID, LLM_LINK_FAILED.

        And Exhausted for more connections than there may be.
        """
        endpoint, pool = name.endpoint, self.pool
        making, deadline = object(), Deadline.after(timeout_s)
        try:
            pool.begin(making, endpoint, deadline)
            peer = self._links.peer_at(endpoint)
            if peer is not None and self._finish(endpoint, peer, deadline):
                peer = self._links.peer_at(endpoint)
            if peer is not None:
                raise LLMException(
                    f"{name} is connected already: disconnect first", LLMStatusCode.LLM_ALREADY_LINK
                )
            pool.make_room(making, deadline)
            left_s = max(0.001, deadline.remaining_s())
            outcome = self._cluster.link([Target(None, (endpoint,))], left_s)[0]
        finally:
            pool.making.pop(making, None)
            pool.bell.ring()
        if outcome.status is not _OK:
            own_id, hint = self._cluster.cluster_id, ""
            if str(own_id) in outcome.reason:
                hint = f" (the name of this engine makes its cluster id, {own_id})"
            raise LLMException(f"{name}: {outcome.reason}{hint}", outcome.status)

    def disconnect(self, name: EngineName, timeout_s: float) -> None:
        """Ends the connection, and what is moved over it by calls of ours.

        Raises LLMException: LLM_NOT_YET_LINK when there is none of our own, LLM_TIMEOUT when the
        peer did not agree in time; the connection has ended all the same.
        """
        peer = self._links.peer_at(name.endpoint)
        if peer is None:
            raise self._missing(name)
        outcome = self._end(name.endpoint, peer, timeout_s)
        if outcome.status is not _OK:
            raise LLMException(
                f"{name} did not agree within {timeout_s:.3f} s; the connection was cut",
                outcome.status,
            )

    def _end(self, endpoint: Endpoint, peer: Peer, timeout_s: float) -> Outcome:
        """Whether the peer agreed."""
        target = Target(None, (endpoint,))
        self._leaving[endpoint] = peer
        self._gate.shut(peer.door, "the connection was ended by disconnect")
        self._gate.cut(peer.door)
        outcome = self._cluster.unlink([target], timeout_s, force=False)[0]
        if outcome.status is not _OK:
            self._cluster.unlink([target], timeout_s, force=True)
        self._gate.drain(peer.door, _LAST_S)
        self._leaving.pop(endpoint, None)
        self.pool.bell.ring()
        return outcome

    def _finish(self, endpoint: Endpoint, peer: Peer, deadline: Deadline) -> bool:
        """What others began: a `disconnect`, or the end of an idle connection; if there is any."""
        left_s = max(0.001, min(IDLE_S, deadline.remaining_s()))
        if self._leaving.get(endpoint) is peer:
            self._end(endpoint, peer, left_s)
            return True
        if peer.door.shut_because is None:
            return False
        self._cluster.unlink([Target(None, (endpoint,))], left_s, force=False)
        return True

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

        Raises LLMException: LLM_NOT_YET_LINK, and as `connect` does; NotBegun when it has ended
        again meanwhile.
        """
        peer = self._find(name)
        if peer is not None and not (self.connect_themselves and peer.door.shut_because):
            return peer
        if not self.connect_themselves or name.port is None:
            raise self._missing(name)
        try:
            self.connect(name, deadline.require(f"connecting to {name}"))
        except LLMException as error:  # another thread was quicker
            if error.status_code is not LLMStatusCode.LLM_ALREADY_LINK:
                raise
        peer = self._find(name)
        if peer is None:  # or has ended again, as an idle one
            missing = self._missing(name)
            raise NotBegun(str(missing), missing.status_code)
        return peer

    def _find(self, name: EngineName) -> Peer | None:
        peer = self._peers.get(name)
        if peer is None or peer.is_gone:
            if name.port is not None:
                peer = self._links.peer_at(name.endpoint)
            if peer is None or peer.is_gone:
                self._peers.pop(name, None)
                return self._caller(name)
            self._forget_others_that_are_gone()
            self._peers[name] = peer
        if name.port is not None:
            self.pool.use(name.endpoint)
        return peer

    def _forget_others_that_are_gone(self) -> None:
        """Or each engine that there ever was would be kept, with its table."""
        for known, peer in dict(self._peers).items():
            if peer.is_gone:
                self._peers.pop(known, None)

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
