"""The gate: what runs on a cluster, what it uses, and how it is waited for.

Each call that moves bytes is in here from its beginning to its end: pulls, pushes, copies, layers
of a transfer, what a peer has us fetch. A call is a token of its own, and `running` says what it
uses: the door of the cluster, that of a link, caches. To end something is always the same: shut its
door, so that nothing new begins to use it, and drain it, by a deadline. What has no door, as a
cache, is kept from new uses by its owner.

A call ends by one step that nothing can come between: `running.pop(token, None)`. An exception out
of a signal handler strikes in front of it or behind it, never in it; so what a call entered is left
with it, once, however it ends. That is why there is a table of tokens and no counter, and why
`leave` is spelled out where a program's own thread passes (`transfers/transfers.py`): a signal may
strike at the beginning of a function of ours. `running/bell.py` says more.

The table is looked through as a `list` of it, which is one step: in making a `tuple`, or pairs, of
a dict Python up to 3.11 may run finalizers, and one that enters breaks it off by a RuntimeError. So
it is done everywhere with what several threads change.

Any thread may call anything here, and there is no lock: a call enters first and looks whether the
door is shut then, and whoever shuts a door looks for those inside then, so that one of the two sees
the other. Rejected: a count for each link and each cache under locks of their own (an exception
between two of them left one raised for ever).
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.running.bell import Bell
from llm_datadist.running.deadline import Token

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.observe.recorder import Recorder


class Door:
    """What calls go through: a cluster's, or a link's. Shut and opened by the gate."""

    __slots__ = ("shut_because",)

    def __init__(self, shut_because: str | None = None) -> None:
        self.shut_because = shut_because


class Gate:
    """What runs on one cluster. Thread-safe."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder
        #: by token, what the call uses
        self.running: dict[object, tuple[object, ...]] = {}
        #: rung when a call has ended
        self.bell = Bell()
        #: every call goes through this one
        self.door = Door()

    def enter(self, token: object, door: Door | None = None, *used: object) -> None:
        """The call begins, or uses one thing more. `leave` must follow, also when it raises.

        Raises LLMException: LLM_NOT_YET_LINK when the door is shut, LLM_FAILED when the cluster is.
        """
        before = self.running.get(token) or (self.door,)
        self.running[token] = (*before, *used) if door is None else (*before, door, *used)
        # not before: whoever shuts a door looks behind that for those who are inside
        if self.door.shut_because is not None:
            raise LLMException(self.door.shut_because, LLMStatusCode.LLM_FAILED)
        if door is not None and door.shut_because is not None:
            raise LLMException(door.shut_because, LLMStatusCode.LLM_NOT_YET_LINK)

    def leave(self, token: object) -> None:
        """The call has ended. May be called again."""
        try:
            self.running.pop(token, None)
        finally:
            self.bell.ring()

    @contextmanager
    def passing(self) -> Iterator[Token]:
        """A call in a thread of the library's, which no signal interrupts; its token."""
        token = Token(self.running)
        try:
            yield token
        finally:
            self.leave(token)

    def shut(self, door: Door, because: str) -> None:
        """Nothing goes through from here on."""
        door.shut_because = because

    def open(self, door: Door) -> None:
        """The end of `shut`."""
        door.shut_because = None

    def cut(self, used: object) -> None:
        """All calls that use it end soon, by an exception. In any thread."""
        for token in list(self.running):
            if isinstance(token, Token) and used in (self.running.get(token) or ()):
                token.cut()

    def count(self, used: object) -> int:
        """How many calls use it."""
        return sum(used in things for things in list(self.running.values()))

    def uses_beside(self, used: object) -> list[object]:
        """What else the calls use that use it."""
        users = [things for things in list(self.running.values()) if used in things]
        return [thing for things in users for thing in things]

    def drain(self, used: object, timeout_s: float) -> bool:
        """Waits until no call uses it any more; False when some still do."""
        if not self.count(used):
            return True
        with self._recorder.waiting("gate") if self._recorder else nullcontext():
            return self.bell.wait_until(lambda: not self.count(used), timeout_s)
