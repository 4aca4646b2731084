"""What is asked of one live link: memory moved by its addresses, or a notice."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_datadist.core.generations import STALE
from llm_datadist.core.ranges import PushedLayout
from llm_datadist.errors import LLMException
from llm_datadist.transport.base import StaleCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from llm_datadist.core.by_address import ByAddress, Part
    from llm_datadist.core.remote import RemoteTable
    from llm_datadist.core.segments import Segments
    from llm_datadist.observe.watch import Watch
    from llm_datadist.owner.catalog import Catalog
    from llm_datadist.peer.peer import Peer
    from llm_datadist.running.deadline import Deadline, Token

#: memory of the peer's that is registered anew while it is moved is looked up so many times
_ATTEMPTS = 3


class NotBegun(LLMException):
    """The link ended before anything was done: another link may do it."""


@dataclass(frozen=True, slots=True, eq=False)
class OnLink(abc.ABC):
    """Something to do over the link to a peer, within a time."""

    peer: Peer
    to: str  #: what the program calls the peer
    timeout_s: float

    @property
    @abc.abstractmethod
    def operation(self) -> str:
        """What it is called where it is counted."""

    @abc.abstractmethod
    def carry_out(
        self, token: Token, catalog: Catalog, deadline: Deadline, watch: Watch | None
    ) -> None:
        """In a call that has entered the link's door. Raises LLMException."""


@dataclass(frozen=True, slots=True, eq=False)
class Notice(OnLink):
    """A text for the peer's program, with its name."""

    name: str
    text: str

    @property
    def operation(self) -> str:
        return "notify"

    def __str__(self) -> str:
        return f"notice to {self.to}"

    def carry_out(
        self, token: Token, catalog: Catalog, deadline: Deadline, watch: Watch | None
    ) -> None:
        """Returns when the peer has it."""
        self.peer.notify(self.name, self.text, deadline)


@dataclass(frozen=True, slots=True, eq=False)
class Move(OnLink):
    """Memory of the peer's into ours, or ours into the peer's."""

    pieces: ByAddress
    #: raises when it is not wanted any more; asked when it has entered the link
    require: Callable[[], None] | None = None

    @property
    def operation(self) -> str:
        return "push" if self.pieces.is_write else "pull"

    def __str__(self) -> str:
        verb, where = ("write", "to") if self.pieces.is_write else ("read", "from")
        return f"{verb} of {len(self.pieces)} pieces {where} {self.to}"

    def carry_out(
        self, token: Token, catalog: Catalog, deadline: Deadline, watch: Watch | None
    ) -> None:
        """Returns when all bytes have been moved, of memory that was registered throughout.

        Our memory stays registered meanwhile. What is known of the peer's may be out of date: then
        it is asked.
        """
        if self.require is not None:
            self.require()
        table = self.peer.table(deadline)
        for attempts_left in range(_ATTEMPTS - 1, -1, -1):
            if watch is not None:
                watch.plans()
            try:
                parts = self.pieces.parts(table.ranges)
            except LLMException:
                table = self.peer.table(deadline, table)  # it may be registered by now
                parts = self.pieces.parts(table.ranges)
            try:
                if watch is not None:
                    watch.moves(self.pieces.whole)
                for part in parts:
                    self._move(part, table, token, catalog, deadline)
            except StaleCache:
                if not attempts_left:
                    raise
                table = self.peer.table(deadline, table)
            else:
                return

    def _move(
        self, part: Part, table: RemoteTable, token: Token, catalog: Catalog, deadline: Deadline
    ) -> None:
        remote = table.find(part.their_id)
        assert remote is not None
        ours = catalog.use(token, part.our_id)
        if not self.pieces.is_write:
            self.peer.read(part.segments, remote.guard, ours, deadline)
            return
        # of memory that peers may not reach this one may have, for now, what it is sent
        segments, pushed = part.segments, None
        if not ours.is_remote_accessible:
            pushed = PushedLayout.of(segments.src, segments.nbytes)
        ticket = catalog.issue(token, ours, self.peer, pushed)
        token.cell = ticket.cell
        try:
            for window in _windows(segments, remote.layout.geometry.tensor_nbytes):
                self.peer.send(window, ticket.guard, remote.guard, deadline)
        finally:
            ticket.cell[0] = STALE


def _windows(segments: Segments, holds: int) -> Iterable[Segments]:
    """The receiver takes no more bytes at a time than its memory has; pieces may overlap there."""
    if segments.total_nbytes <= holds:
        return (segments,)
    return segments.windows(len(segments), holds)
