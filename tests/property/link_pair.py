"""Two link machines joined by a pipe in memory, with an executor that does what they decide.

Nothing happens by itself: a test says when a message arrives, when a probe is done, and so on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from llm_datadist.core import link as lk
from llm_datadist.core import link_actions as act
from llm_datadist.core import messages as m
from llm_datadist.errors import LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

EVENTS: Final = ("deliver", "met", "probed", "drained", "leave", "stay", "cut", "lost", "timed_out")


def make_identity(
    cluster_id: int,
    paths: Iterable[str],
    *,
    path: str = "auto",
    is_remote_accessible: bool = False,
) -> lk.Identity:
    probe = m.ProbeTarget(4096, bytes([cluster_id] * 16), 8192, 1)
    offers = {name: name.encode() for name in paths}
    instance = bytes([100 + cluster_id] * 16)
    return lk.Identity(cluster_id, instance, is_remote_accessible, offers, probe, path)


@dataclass(eq=False)
class End:
    """One machine and its executor, which checks every decision against what it may decide."""

    link: lk.CallerLink | lk.ListenerLink
    #: the paths on which this end's probes fail
    failing: Container[str] = ()
    #: a live link to this very peer exists
    is_known: bool = False
    #: what arrives, in order; None is the end of the connection
    inbox: deque[m.Message | None] = field(default_factory=deque)
    #: what this end put on the connection
    sent: list[m.Message] = field(default_factory=list)
    #: it is linking over the peer's same-host socket
    is_meeting: bool = False
    #: that link is made, and has taken this one's place
    has_met: bool = False
    #: the path that is being probed
    probing: str | None = None
    verified: set[str] = field(default_factory=set)
    published: str | None = None
    drains: int = 0
    is_retracted: bool = False
    dialled: int = 0
    learned: list[act.Learn] = field(default_factory=list)
    close: act.Close | None = None

    def join(self, peer: End) -> None:
        self._peer, peer._peer = peer, self

    def due(self) -> str | None:
        """The next event that will come by itself."""
        if self.is_meeting:
            return "met"
        if self.probing is not None:
            return "probed"
        if self.drains:
            return "drained"
        return "deliver" if self.inbox else None

    def happens(self, event: str) -> None:
        """One of EVENTS, if it can be now."""
        if event == "deliver" and self.inbox:
            self._deliver(self.inbox.popleft())
        elif event == "met" and self.is_meeting:
            assert isinstance(self.link, lk.CallerLink)
            self.is_meeting = False
            self.has_met = all(
                lk.SAME_HOST not in end.failing and end.link.me.path in ("auto", lk.SAME_HOST)
                for end in (self, self._peer)
            )
            self.perform(self.link.met(None if self.has_met else "it fails"))
        elif event == "probed" and self.probing is not None:
            path, self.probing = self.probing, None
            if path in self.failing:
                self.perform(self.link.probed(path, "it fails", is_remarkable=True))
            else:
                self.verified.add(path)
                self.perform(self.link.probed(path, None, is_remarkable=False))
        elif event == "drained" and self.drains:
            self.drains -= 1
            self.perform(self.link.drained())
        elif event == "leave":
            self.perform(self.link.leave())
        elif event == "stay":
            self.link.stay()
        elif event == "cut":
            self.perform(self.link.cut("it was cut"))
        elif event == "lost":
            self.perform(self.link.lost("the connection broke"))
        elif event == "timed_out":
            self.perform(self.link.timed_out("it took too long"))

    def perform(self, actions: Sequence[act.Action]) -> None:
        for action in actions:
            assert self.close is None, f"{action} after {self.close}"
            if isinstance(action, act.Send):
                assert self.is_retracted or not isinstance(action.message, m.ByeDone)
                self._send(action.message)
            elif isinstance(action, act.Probe):
                assert self.probing is None
                self.probing = action.path
            elif isinstance(action, act.Meet):
                assert not self.link.is_same_host
                self.is_meeting = True
            elif isinstance(action, act.Publish):
                assert action.path in self.verified
                assert self.published is None
                self.published = action.path
            elif isinstance(action, act.Drain):
                self.drains += 1
            elif isinstance(action, act.Retract):
                assert self.published is not None
                self.is_retracted = True
            elif isinstance(action, act.SayWhether):
                self._send(m.Vouched(action.connection, True))
            elif isinstance(action, act.Learn):
                self.learned.append(action)
            elif isinstance(action, act.Dial):
                self.dialled += action.count
            else:
                if action.status is LLMStatusCode.LLM_SUCCESS:  # the link goes on elsewhere
                    assert self.has_met or isinstance(self.link, lk.ListenerLink)
                    assert self.published is None
                self.is_meeting = False
                self.close = action
                self.inbox.clear()
                self._put(None)
        assert (self.close is not None) == (self.link.state is lk.State.CLOSED)

    def _deliver(self, message: m.Message | None) -> None:
        if message is None:
            self.perform(self.link.lost("the peer closed the connection"))
        elif isinstance(self.link, lk.ListenerLink) and self.link.state is lk.State.NEW:
            assert isinstance(message, m.Hello)
            self.perform(self.link.admit(message, is_known=self.is_known))
        else:
            self.perform(self.link.received(message))

    def _send(self, message: m.Message) -> None:
        received = m.decode(m.encode(message)[m.HEADER.size :])
        self.sent.append(received)
        self._put(received)

    def _put(self, message: m.Message | None) -> None:
        if self._peer.close is None:
            self._peer.inbox.append(message)


class Pair:
    """A caller and a listener at the beginning of a hand-shake."""

    def __init__(
        self,
        caller: lk.Identity,
        listener: lk.Identity,
        *,
        failing: Sequence[Container[str]] = ((), ()),
        is_known: bool = False,
        is_fresh: bool = True,
        is_same_host: bool = False,
    ) -> None:
        link = lk.CallerLink(caller, is_same_host)
        answering = lk.ListenerLink(listener, is_same_host, token=b"t" * 16)
        self.caller = End(link, failing[0])
        self.listener = End(answering, failing[1], is_known)
        self.caller.join(self.listener)
        self.caller.perform(link.start(bytes(16), is_fresh=is_fresh, timeout_ms=3000))

    @property
    def ends(self) -> tuple[End, End]:
        return self.caller, self.listener

    @property
    def states(self) -> tuple[lk.State, lk.State]:
        return self.caller.link.state, self.listener.link.state

    def step(self) -> bool:
        """Lets the next thing happen that is under way; False when there is none."""
        for end in self.ends:
            event = end.due()
            if event is not None:
                end.happens(event)
                return True
        return False

    def settle(self) -> int:
        """Lets all that is under way happen, and counts it. Fails when there is no end to it."""
        for steps in range(200):
            if not self.step():
                return steps
        raise AssertionError(f"two machines talk for ever: {self.caller.sent[-4:]}")
