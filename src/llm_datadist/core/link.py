"""The link state machine: events in, actions out. No sockets, clocks or threads.

    caller                                listener
    ------                                --------
    NEW       -- Hello -->                NEW
    GREETING                              admits or refuses
              <-- Welcome --              OFFERED
    PROBING   verifies a path
              -- Ready(path) -->          PROBING  verifies the path in its direction
    AGREEING                              publishes the link
              <-- Linked(path) --         LINKED
    LINKED    publishes the link

Ends of one host meet: the caller goes to the listener's same-host socket, where the kernel says who
is at the other end, and begins anew there (MEETING); when that link is made the first connection
ends with Moved. What was said on it counts for nothing, so nobody who passed it on is part of the
link. Where they cannot meet the hand-shake goes on, and the link has another path.

A listener that cannot use the path answers Unusable, and the caller proposes its next one. A link
is published only after both ends have moved bytes over the path; whatever fails before that closes
the connection, which the other end sees, so that neither keeps half a link. Each side's state
changes in one thread only, the cluster's loop.
"""

from __future__ import annotations

import abc
import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.core.link_actions import (
    Action,
    Close,
    Dial,
    Drain,
    Learn,
    Meet,
    Probe,
    Publish,
    Retract,
    SayWhether,
    Send,
)
from llm_datadist.errors import LLMStatusCode, code_to_status

if TYPE_CHECKING:
    from collections.abc import Mapping

#: best first; a transport from outside that is not named here comes after "cma"
PREFERENCE = ("cma", "nixl", "tcp")
#: the path of links over a same-host socket, and of no others
SAME_HOST = "cma"
#: a caller that proposes more paths than there can be is none
_MAX_PROPOSALS = 16


class State(enum.Enum):
    NEW = "new"
    GREETING = "greeting"
    MEETING = "meeting"
    OFFERED = "offered"
    PROBING = "probing"
    AGREEING = "agreeing"
    LINKED = "linked"
    LEAVING = "leaving"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as it said in the hand-shake."""

    cluster_id: int
    instance: bytes
    offers: Mapping[str, bytes]
    probe: m.ProbeTarget


@dataclass(frozen=True, slots=True)
class Identity:
    """What this end says of itself."""

    cluster_id: int
    instance: bytes
    is_remote_accessible: bool
    offers: Mapping[str, bytes]
    probe: m.ProbeTarget
    #: the only path allowed, or "auto"
    path: str = "auto"
    #: which of the devices of its process it is, and of how many
    device_index: int = 0
    num_devices: int = 1


def candidates(mine: Mapping[str, bytes], theirs: Mapping[str, bytes], path: str) -> list[str]:
    """The paths that both ends offer, best first."""
    common = [name for name in mine if name in theirs and path in ("auto", name)]
    return sorted(common, key=lambda name: PREFERENCE.index(name) if name in PREFERENCE else 0.5)


@dataclass
class Link(abc.ABC):
    """One end of a link. Subclasses do the hand-shake; this part is common to both ends."""

    me: Identity
    #: the connection is one to the listener's same-host socket
    is_same_host: bool = False
    state: State = State.NEW
    peer: Peer | None = None
    path: str = ""
    #: why paths better than `path` are not used: (path, reason, whether it deserves a warning)
    rejected: list[tuple[str, str, bool]] = field(default_factory=list)

    def received(self, message: m.Message) -> list[Action]:
        """A frame came on the control connection."""
        if self.state is State.CLOSED:
            return []
        if isinstance(message, m.Refused):
            return self._close(status_of(message.status), message.message)
        if self.state in (State.LINKED, State.LEAVING):
            return self._received_when_linked(message)
        return self._greet(message)

    def probed(self, path: str, failure: str | None, *, is_remarkable: bool) -> list[Action]:
        """The result of a Probe; `failure` is None when the path works."""
        if self.state is not State.PROBING:
            return []
        if failure is not None:
            reason = m.as_text(failure)  # a transport may quote what the peer offered
            self.rejected.append((path, reason, is_remarkable))
            return self._path_failed(path, reason, is_remarkable)
        return self._path_works(path)

    def leave(self) -> list[Action]:
        """This end unlinks, its own transfers having ended; the peer answers when its have."""
        if self.state is not State.LINKED:
            return []
        self.state = State.LEAVING
        return [Send(m.Bye())]

    def stay(self) -> None:
        """The peer did not answer in time: the link is kept."""
        if self.state is State.LEAVING:
            self.state = State.LINKED

    def drained(self) -> list[Action]:
        """Running transfers have ended after the peer's Bye."""
        if self.state not in (State.LINKED, State.LEAVING):
            return []
        # retracted first: the peer may act on the answer before we close
        ending = self._close(LLMStatusCode.LLM_NOT_YET_LINK, "the peer unlinked", is_agreed=True)
        return [Retract(), Send(m.ByeDone()), *ending]

    def refuse(self, status: LLMStatusCode, reason: str) -> list[Action]:
        """This end does not want the link, and says why."""
        return [] if self.state is State.CLOSED else self._refuse(status, reason)

    def cut(self, reason: str) -> list[Action]:
        """This end drops the link without a word; the peer sees the connection end."""
        return self._close(LLMStatusCode.LLM_NOT_YET_LINK, reason)

    def lost(self, reason: str) -> list[Action]:
        """The control connection ended or carried what is no message."""
        linked = self.state in (State.LINKED, State.LEAVING)
        return self._close(
            LLMStatusCode.LLM_NOT_YET_LINK if linked else LLMStatusCode.LLM_FAILED, reason
        )

    def timed_out(self, reason: str) -> list[Action]:
        return self._close(LLMStatusCode.LLM_TIMEOUT, reason)

    def _received_when_linked(self, message: m.Message) -> list[Action]:
        if isinstance(message, m.Vouch):
            return [SayWhether(message.connection)]
        if isinstance(message, m.Vouched):
            return [Learn(message.connection, message.is_ours)]
        if isinstance(message, m.Bye):
            return [Drain()]
        if isinstance(message, m.ByeDone):  # one that comes after `stay` ends the link as well
            return self._close(LLMStatusCode.LLM_NOT_YET_LINK, "it was unlinked", is_agreed=True)
        return self._unexpected(message)

    def _paths(self, theirs: Mapping[str, bytes]) -> list[str]:
        """The paths that may be proposed on this connection, best first."""
        common = candidates(self.me.offers, theirs, self.me.path)
        return [path for path in common if (path == SAME_HOST) == self.is_same_host]

    @abc.abstractmethod
    def _greet(self, message: m.Message) -> list[Action]: ...

    @abc.abstractmethod
    def _path_works(self, path: str) -> list[Action]: ...

    @abc.abstractmethod
    def _path_failed(self, path: str, reason: str, is_remarkable: bool) -> list[Action]: ...

    def _unexpected(self, message: m.Message) -> list[Action]:
        return self._refuse(
            LLMStatusCode.LLM_FAILED,
            f"{type(message).__name__} is not expected while {self.state.value}",
        )

    def _refuse(self, status: LLMStatusCode, reason: str) -> list[Action]:
        return [Send(m.Refused(status, m.as_text(reason))), *self._close(status, reason)]

    def _close(
        self, status: LLMStatusCode, reason: str, *, is_agreed: bool = False
    ) -> list[Action]:
        if self.state is State.CLOSED:
            return []
        self.state = State.CLOSED
        return [Close(status, m.as_text(reason), is_agreed)]

    def _check_terms(self, version: int, is_remote_accessible: bool | None) -> str | None:
        """Why the two ends cannot link, or None."""
        if version != m.PROTOCOL_VERSION:
            return (
                f"cluster {self.me.cluster_id} speaks protocol {m.PROTOCOL_VERSION}, its peer "
                f"{version}: install the same release of llm-datadist on both"
            )
        if is_remote_accessible not in (None, self.me.is_remote_accessible):
            return (
                "enable_remote_cache_accessible differs: cluster "
                f"{self.me.cluster_id} has {self.me.is_remote_accessible}, its peer "
                f"{is_remote_accessible}; set it alike on both"
            )
        return None


@dataclass
class CallerLink(Link):
    """The end that called `link_clusters`."""

    #: who must answer, where that is known
    expected: bytes = b""
    only: int | None = None
    _candidates: list[str] = field(default_factory=list)
    token: bytes = b""
    #: why the first connection ended while the ends met; empty while it lives
    _lost_because: str = ""

    @property
    def has_answered(self) -> bool:
        """The one that was called is there."""
        return self.peer is not None and self.expected in (b"", self.peer.instance)

    def unanswered(self, reason: str) -> list[Action]:
        """Its time to do so is over."""
        return [] if self.has_answered else self.timed_out(reason)

    def start(
        self,
        nonce: bytes,
        *,
        is_fresh: bool,
        timeout_ms: int,
        group: str = "",
        bundle: bytes = b"",
    ) -> list[Action]:
        self.state = State.GREETING
        me = self.me
        return [
            Send(
                m.Hello(
                    m.PROTOCOL_VERSION,
                    me.cluster_id,
                    me.instance,
                    me.is_remote_accessible,
                    is_fresh,
                    timeout_ms,
                    dict(me.offers),
                    me.probe,
                    group,
                    nonce,
                    me.device_index,
                    me.num_devices,
                    bundle,
                )
            )
        ]

    def _greet(self, message: m.Message) -> list[Action]:
        if isinstance(message, m.Welcome) and self.state is State.GREETING:
            return self._welcomed(message)
        if self.state is State.AGREEING:
            if isinstance(message, m.Linked) and message.path == self.path:
                self.state = State.LINKED
                return [Publish(self.path)]
            if isinstance(message, m.Unusable):
                self.rejected.append((message.path, message.reason, message.is_remarkable))
                return self._propose()
            if isinstance(message, m.DialBack):
                return [Dial(message.count)]
        return self._unexpected(message)

    def _received_when_linked(self, message: m.Message) -> list[Action]:
        if isinstance(message, m.DialBack):
            return [Dial(message.count)]
        return super()._received_when_linked(message)

    def _welcomed(self, message: m.Welcome) -> list[Action]:
        refusal = self._check_terms(message.version, None)
        if refusal is not None:
            return self._refuse(LLMStatusCode.LLM_PARAM_INVALID, refusal)
        self.peer = Peer(message.cluster_id, message.instance, message.offers, message.probe)
        is_other = self.only not in (None, message.cluster_id)
        if is_other or self.expected not in (b"", message.instance):
            return self._refuse(
                LLMStatusCode.LLM_LINK_FAILED,
                f"cluster {message.cluster_id} answers there, and not the process that was called",
            )
        self.token = message.token
        self._candidates = self._paths(message.offers)
        common = candidates(self.me.offers, message.offers, self.me.path)
        if self.is_same_host or SAME_HOST not in common:
            return self._propose()
        self.state = State.MEETING
        if message.offers[SAME_HOST]:
            return [Meet(message.offers[SAME_HOST])]
        return self.met(f"cluster {message.cluster_id} does not allow it", is_remarkable=False)

    def met(self, failure: str | None, *, is_remarkable: bool = True) -> list[Action]:
        """The result of a Meet; `failure` is None when the link is made there."""
        if self.state is not State.MEETING:
            return []
        if failure is None:
            ending = self._close(LLMStatusCode.LLM_SUCCESS, "it goes on over a same-host socket")
            return [Send(m.Moved()), *ending]
        if self._lost_because:
            return self._close(LLMStatusCode.LLM_FAILED, self._lost_because)
        self.rejected.append((SAME_HOST, failure, is_remarkable))
        return self._propose()

    def ended_elsewhere(self, status: LLMStatusCode, reason: str) -> list[Action]:
        """The link that was made, or being made, where the ends met has ended: so has this one."""
        return self._close(status, reason) if self.state is State.MEETING else []

    def lost(self, reason: str) -> list[Action]:
        """As above; while the ends meet elsewhere, the first connection may end."""
        if self.state is not State.MEETING:
            return super().lost(reason)
        self._lost_because = reason
        return []

    def _propose(self) -> list[Action]:
        if not self._candidates:
            tried = "; ".join(f"{path}: {reason}" for path, reason, _ in self.rejected)
            return self._refuse(
                LLMStatusCode.LLM_LINK_FAILED,
                f"no path works in both directions ({tried or 'none is offered by both ends'})",
            )
        self.state = State.PROBING
        self.path = self._candidates.pop(0)
        return [Probe(self.path)]

    def _path_works(self, path: str) -> list[Action]:
        self.state = State.AGREEING
        unmet = next((reason for name, reason, _ in self.rejected if name == SAME_HOST), "")
        return [Send(m.Ready(path, m.as_text(unmet)))]

    def _path_failed(self, path: str, reason: str, is_remarkable: bool) -> list[Action]:
        return self._propose()


@dataclass
class ListenerLink(Link):
    """The end that was called."""

    token: bytes = b""

    def objection_to(self, hello: m.Hello) -> str | None:
        """Why the two ends cannot link, whoever the caller is."""
        return self._check_terms(hello.version, hello.is_remote_accessible) or self._check_devices(
            hello
        )

    def _check_devices(self, hello: m.Hello) -> str | None:
        """Device i of a process links to device i of another that has as many, or nobody does."""
        me = self.me
        if hello.num_devices != me.num_devices:
            return (
                f"cluster {hello.cluster_id} has {hello.num_devices} device(s), and cluster "
                f"{me.cluster_id} has {me.num_devices}: both ends need as many"
            )
        if hello.device_index != me.device_index:
            return (
                f"device {hello.device_index} of cluster {hello.cluster_id} called device "
                f"{me.device_index} of cluster {me.cluster_id}: give the remote addresses in the "
                "order of the devices"
            )
        return None

    def admit(self, hello: m.Hello, *, is_known: bool) -> list[Action]:
        """Decides on a Hello; `is_known` says that a live link to this very peer exists."""
        refusal = self.objection_to(hello)
        if refusal is not None:
            return self._refuse(LLMStatusCode.LLM_PARAM_INVALID, refusal)
        if is_known and not hello.is_fresh:
            return self._refuse(
                LLMStatusCode.LLM_ALREADY_LINK,
                f"clusters {hello.cluster_id} and {self.me.cluster_id} are linked already",
            )
        self.peer = Peer(hello.cluster_id, hello.instance, hello.offers, hello.probe)
        self.state = State.OFFERED
        me = self.me
        return [
            Send(
                m.Welcome(
                    m.PROTOCOL_VERSION,
                    me.cluster_id,
                    me.instance,
                    self.token,
                    dict(me.offers),
                    me.probe,
                )
            )
        ]

    def _greet(self, message: m.Message) -> list[Action]:
        if len(self.rejected) > _MAX_PROPOSALS:
            return self._unexpected(message)
        if isinstance(message, m.Moved) and self.state is State.OFFERED:
            return self._close(LLMStatusCode.LLM_SUCCESS, "it goes on over a same-host socket")
        if isinstance(message, m.Ready) and self.state is State.OFFERED and self.peer is not None:
            self.state = State.PROBING
            if message.unmet and not self.is_same_host and not self.rejected:
                self.rejected.append((SAME_HOST, message.unmet, False))  # the caller has warned
            if message.path in self._paths(self.peer.offers):
                return [Probe(message.path)]
            return self.probed(
                message.path, f"cluster {self.me.cluster_id} does not allow it", is_remarkable=False
            )
        return self._unexpected(message)

    def _path_works(self, path: str) -> list[Action]:
        self.path, self.state = path, State.LINKED
        return [Publish(path), Send(m.Linked(path))]

    def _path_failed(self, path: str, reason: str, is_remarkable: bool) -> list[Action]:
        self.state = State.OFFERED
        return [Send(m.Unusable(path, reason, is_remarkable))]


def status_of(number: int) -> LLMStatusCode:
    """A peer's status number; it refused, so success is none."""
    status = code_to_status(number)
    return LLMStatusCode.LLM_FAILED if status is LLMStatusCode.LLM_SUCCESS else status
