"""The table of live links, by the cluster id that the peer said it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.locks import make_lock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.endpoint import Endpoint
    from llm_datadist.links.session import Session
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.peer.peer import Peer


#: so many clusters that were linked once are remembered
_MAX_ENDINGS = 128


class LinkInfo(NamedTuple):
    """A live link, as users see it. An addition to the reference."""

    cluster_id: int
    path: str  #: how its bytes travel: "cma" (same host) or "tcp"
    path_reason: str  #: why no better path is used; empty when there is none
    #: where we called the peer; None when it called us, or when a rank table led to it on this host
    endpoint: Endpoint | None
    #: which start of the peer's cluster it is: 32 hexadecimal digits
    incarnation: str = ""
    #: what encrypts all that is said on it and, but for "cma", what is moved: nothing, "tls",
    #: "tls-records": larger ones, where both ends have the extra `tls`, or "ktls": both kernels
    encryption: str = ""


class TableWatcher(Protocol):
    """Who is told of links. In the loop's thread, but for `missing`."""

    def link_made(self, session: Session) -> None:
        """Operations find it."""
        ...

    def link_ended(self, session: Session) -> None:
        """They do not find it any more."""
        ...

    def used(self, sessions: Sequence[Session]) -> Session | None:
        """In any thread: which of the links to one cluster id an operation uses; newest first."""
        ...

    def missing(self, cluster_id: int) -> str:
        """In any thread: somebody needs a link to it, and there is none; what is known of it."""
        ...


class LinkTable:
    """Live links. Thread-safe.

    Several peers may carry one cluster id (spec 12.7): each keeps its link, told apart by instance
    and address, and an operation that names only the id uses the newest.
    """

    def __init__(self, cluster_id: int, instance: bytes, recorder: Recorder | None = None) -> None:
        self._cluster_id = cluster_id
        self._instance = instance
        self._recorder = recorder
        self._lock = make_lock()
        self._sessions: dict[int, list[Session]] = {}
        #: of the links that operations use; may be read without the lock
        self.paths: dict[int, str] = {}
        #: why the last link to a cluster ended, for the error of whoever still uses it
        self._endings: dict[int, str] = {}
        self.watcher: TableWatcher | None = None

    def add(self, session: Session) -> None:
        """Files a live session, as the newest to its cluster."""
        with self._lock:
            self._sessions.setdefault(session.cluster_id, []).insert(0, session)
            self.paths[session.cluster_id] = session.path
            self._endings.pop(session.cluster_id, None)
        if self._recorder is not None:
            self._recorder.link_made(session.path)
        if self.watcher is not None:
            self.watcher.link_made(session)

    def remove(self, session: Session, ending: str) -> None:
        with self._lock:
            others = self._sessions.get(session.cluster_id, [])
            was_filed = session in others
            if was_filed:
                others.remove(session)
            if others:
                self.paths[session.cluster_id] = others[0].path
            elif self._sessions.pop(session.cluster_id, None) is not None:
                del self.paths[session.cluster_id]
                self._endings[session.cluster_id] = ending
                while len(self._endings) > _MAX_ENDINGS:
                    del self._endings[next(iter(self._endings))]
        if was_filed and self._recorder is not None:
            self._recorder.link_ended(session.path)
        if was_filed and self.watcher is not None:
            self.watcher.link_ended(session)

    def find(self, cluster_id: int) -> Peer:
        """The peer that an operation means. Raises LLMException(LLM_NOT_YET_LINK)."""
        watcher = self.watcher
        with self._lock:
            sessions = self._sessions.get(cluster_id)
            if sessions:
                session = sessions[0] if watcher is None else watcher.used(sessions)
                if session is not None and session.peer is not None:
                    return session.peer
            ending = self._endings.get(cluster_id)
        because = f": the last link ended because {ending}" if ending else ""
        if watcher is not None:
            if sessions:
                because = ", but for a start of it that is not, or no more, the one of its fleet"
            raise LLMException(
                f"cluster {self._cluster_id} is not linked to cluster {cluster_id}{because}; of "
                f"its fleet it knows: {watcher.missing(cluster_id)}",
                LLMStatusCode.LLM_NOT_YET_LINK,
            )
        raise LLMException(
            f"cluster {self._cluster_id} is not linked to cluster {cluster_id}{because}; "
            "call link_clusters first",
            LLMStatusCode.LLM_NOT_YET_LINK,
        )

    def is_self(self, cluster_id: int) -> bool:
        """Whether the id means this cluster, and no peer that happens to carry the same id."""
        if cluster_id != self._cluster_id:
            return False
        return all(session.instance == self._instance for session in self.of(cluster_id))

    def of(self, cluster_id: int, endpoint: Endpoint | None = None) -> list[Session]:
        """The live sessions to a cluster: those to the peer at the endpoint, if any, else all.

        Two ends that linked to each other at once have one in each direction.
        """
        with self._lock:
            sessions = list(self._sessions.get(cluster_id, ()))
        peers = {s.instance for s in sessions if endpoint is not None and s.endpoint == endpoint}
        return [session for session in sessions if session.instance in peers] or sessions

    def peer_at(self, endpoint: Endpoint) -> Peer | None:
        """The peer that we called there, while its link lives."""
        return next((each.peer for each in self.at(endpoint) if each.peer is not None), None)

    def at(self, endpoint: Endpoint) -> list[Session]:
        return [session for session in self.all() if session.endpoint == endpoint]

    def with_instance(self, instance: bytes) -> list[Session]:
        return [session for session in self.all() if session.instance == instance]

    def all(self) -> list[Session]:
        with self._lock:
            return [session for sessions in list(self._sessions.values()) for session in sessions]

    def infos(self) -> list[LinkInfo]:
        """Each link as users see it."""
        return [
            LinkInfo(
                session.cluster_id,
                session.path,
                session.path_reason,
                session.endpoint,
                session.instance.hex(),
                session.control.shield.encryption,
            )
            for session in self.all()
        ]
