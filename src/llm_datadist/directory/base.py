"""What a directory is: the small protocol that backends implement.

Nothing here compares clocks of two machines. A member renews what it announced; who watches
measures by its own clock how long nothing was renewed. Each call may block for as long as its
medium does (a network file system, a server), and raises DirectoryError when that fails; so the
library calls them in threads of their own, and a directory that is gone changes nothing for links.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from llm_datadist.directory.record import Record


class DirectoryError(Exception):
    """A directory cannot be asked or told now; the message says why. Try again later."""


class Superseded(DirectoryError):
    """Another start of the same cluster id has announced itself meanwhile."""


class Change(NamedTuple):
    """A member that says something else of itself: its role, its address, its incarnation."""

    before: Record
    now: Record


class Changes(NamedTuple):
    """What happened since the last time."""

    joined: tuple[Record, ...] = ()
    left: tuple[Record, ...] = ()
    changed: tuple[Change, ...] = ()

    def __bool__(self) -> bool:
        return any(self)


class Announcement(Protocol):
    """What one member announced. For one thread at a time. Raises DirectoryError."""

    def renew(self) -> None:
        """Says that it is still there; several times in each ttl.

        A record that somebody took away is written again. Raises Superseded while another start of
        this cluster id is in its place.
        """
        ...

    def change(self, record: Record) -> None:
        """Replaces what was said. Raises Superseded."""
        ...

    def withdraw(self) -> None:
        """The last word: it has left. May be called again."""
        ...

    def close(self) -> None:
        """Lets go of what this end holds; says nothing."""
        ...


class Watch(Protocol):
    """Who is there. For one thread, but for `interrupt`."""

    def wait(self, timeout_s: float) -> Changes:
        """What happened since the last call, as soon as something has; nothing at the time-out.

        The first call tells of everybody who is there. Raises DirectoryError when the directory is
        gone; may be called again then, and nobody has left for that reason alone: who is missing
        when it is back has its ttl to appear.
        """
        ...

    def interrupt(self) -> None:
        """In any thread: the wait ends soon, and so does each later one. May be called again."""
        ...

    def close(self) -> None:
        """Gives back what it holds. May be called again."""
        ...


class Directory(Protocol):
    """Who is in a fleet. One record for each cluster id: the last start of it."""

    def announce(self, record: Record, ttl_s: float) -> Announcement:
        """Says that this member is there, in place of an earlier start of its id.

        Raises DirectoryError; ValueError for a record or ttl that cannot be written.
        """
        ...

    def watch(self) -> Watch:
        """A new watch; what it needs is opened by its first `wait`."""
        ...
