"""The pool of channels: how many connections of its own an engine has, and which of them it ends.

A call that makes a connection notes it in `making` first, and takes it out in one step when the
connection is filed or has failed. So what there is, and what the calls that came before will make,
is known at any moment, by address: no two calls fill the same place, and no call counts twice.
Calls that want the same one make it one after the other; all but the first find it there.

A transfer notes in `wanted` where it goes. Whoever ends idle connections shuts a door first and
looks for those who want it then; whoever wants one looks at its door behind that.
"""

from __future__ import annotations

import itertools
from threading import get_ident
from typing import TYPE_CHECKING, Final

from llm_datadist.errors import LLMStatusCode
from llm_datadist.hixl.call import Exhausted
from llm_datadist.links.linker import Target
from llm_datadist.running.bell import Bell, TurnInVain, Turns

if TYPE_CHECKING:
    from llm_datadist.cluster import Cluster
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.hixl.options import ChannelPool
    from llm_datadist.links.session import Session
    from llm_datadist.running.deadline import Deadline

#: how long the end of an idle connection may take
IDLE_S: Final = 1.0
#: so many addresses are remembered; a pool has at most 512 connections
_MOST_USED: Final = 1024


class Pool:
    """That of one engine. Thread-safe."""

    def __init__(self, cluster: Cluster, channels: ChannelPool | None) -> None:
        self._cluster = cluster
        self._gate = cluster.gate
        self._channels = channels
        #: calls that are making a connection, in order: where to, and their threads
        self.making: dict[object, tuple[Endpoint, int]] = {}
        #: transfers and notices under way, and where they go
        self.wanted: dict[object, Endpoint] = {}
        #: rung when a call has left `making`, and when a connection was ended here
        self.bell = Bell()
        #: of those that end idle connections
        self._turns = Turns()
        #: when each was used last
        self._used: dict[Endpoint, int] = {}
        self._clock = itertools.count(1)

    def use(self, endpoint: Endpoint) -> None:
        """This one is the last to be ended."""
        if self._channels is None:
            return
        if endpoint not in self._used and len(self._used) >= _MOST_USED:
            live = {session.endpoint for session in self._own()}
            for other in list(self._used):
                if other not in live:
                    self._used.pop(other, None)
        self._used[endpoint] = next(self._clock)

    def begin(self, call: object, endpoint: Endpoint, deadline: Deadline) -> None:
        """Waits until no other call makes the same connection.

        `making.pop(call, None)` and the bell follow, whatever is raised. Raises
        LLMException(LLM_TIMEOUT), TurnInVain.
        """
        self.use(endpoint)
        what, me = f"connecting to {endpoint}", (endpoint, get_ident())
        self.making[call] = me
        if list(self.making.values()).count(me) > 1:
            raise TurnInVain(what)

        def is_first() -> bool:
            return next(each for each, (at, _) in self._makers() if at == endpoint) is call

        if not self.bell.wait_until(is_first, deadline.require(what)):
            raise deadline.expired(what)

    def make_room(self, call: object, deadline: Deadline) -> None:
        """For the connection that the call makes. Raises Exhausted, LLMException(LLM_TIMEOUT)."""
        channels = self._channels
        if channels is None:
            return
        if channels.high is not None and len(self._taken(call)) > channels.high:
            turn = object()
            try:
                self._turns.take(turn, deadline, "making room for another connection")
                most = len(self._taken(call))
                if most > channels.high:
                    self._end_idle(most - max(1, channels.low), deadline)
            finally:
                self._turns.calls.pop(turn, None)
                self._turns.bell.ring()
                self.bell.ring()
        if len(self._taken(call) - self._ending()) <= channels.max_channel:
            left_s = max(0.0, min(IDLE_S, deadline.remaining_s()))
            if self.bell.wait_until(lambda: len(self._taken(call)) <= channels.max_channel, left_s):
                return
        raise Exhausted(
            f"channel_pool.max_channel allows {channels.max_channel} connections, and all of "
            "them are in use"
        )

    def _makers(self) -> list[tuple[object, tuple[Endpoint, int]]]:
        return list(dict(self.making).items())

    def _own(self) -> list[Session]:
        return [each for each in self._cluster.links.all() if each.is_caller]

    def _taken(self, call: object) -> set[object]:
        """The connections that there are, and those of the calls before this one, and its own."""
        taken = set[object]()
        for each, (endpoint, _) in self._makers():  # first: then none is missed that is filed now
            taken.add(endpoint)
            if each is call:
                break
        return taken.union(session.endpoint for session in self._own())

    def _ending(self) -> set[object]:
        """Connections that are being ended, by whomever."""
        return {each.endpoint for each in self._own() if each.door.shut_because is not None}

    def _end_idle(self, most: int, deadline: Deadline) -> None:
        """The connections that were not used for the longest time, if nobody wants them."""
        targets: list[Target] = []
        for session in sorted(self._own(), key=self._last_use):
            endpoint = session.endpoint
            if endpoint is None or len(targets) >= most or self._is_needed(session):
                continue
            self._gate.shut(session.door, "the connection was idle, and others were needed")
            if self._is_needed(session):
                self._gate.open(session.door)
                continue
            targets.append(Target(None, (endpoint,)))
            self._used.pop(endpoint, None)
        if not targets:
            return
        left_s = max(0.001, min(IDLE_S, deadline.remaining_s()))
        outcomes = self._cluster.unlink(targets, left_s, force=False)
        pairs = zip(targets, outcomes, strict=True)
        late = [each for each, outcome in pairs if outcome.status is not LLMStatusCode.LLM_SUCCESS]
        if late:
            self._cluster.unlink(late, left_s, force=True)

    def _last_use(self, session: Session) -> int:
        return 0 if session.endpoint is None else self._used.get(session.endpoint, 0)

    def _is_needed(self, session: Session) -> bool:
        """Whether something runs over it, or will."""
        at = session.endpoint
        is_wanted = at in list(self.wanted.values())
        return (
            is_wanted or session.num_running > 0 or any(at == to for _, (to, _) in self._makers())
        )
