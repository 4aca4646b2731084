"""Locks, and whether this thread holds one: then it must not wait for another thread.

A signal's handler, or a finalizer, runs in the middle of whatever its thread does, under one of our
locks too. It may call us: the locks are re-entrant. But what another thread does for that call may
need the lock, which this one does not give back before the call returns. So whoever hands work to
another thread and waits asks here first: it does the work itself, or does not wait, or refuses.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol, cast


class Lock(Protocol):
    """What `threading.RLock` makes: entering and leaving it are one step each (running/bell.py)."""

    def __enter__(self) -> bool: ...

    def __exit__(self, *exc_info: object) -> None: ...

    def acquire(self) -> bool: ...

    def release(self) -> None: ...

    def _is_owned(self) -> bool: ...


#: replaced as a whole: who reads it has it, whatever finalizers do meanwhile
_locks: tuple[weakref.ref[Lock], ...] = ()
_guard = threading.RLock()


def make_lock() -> Lock:
    """A re-entrant lock that `holds_lock` knows of."""
    global _locks
    lock = cast("Lock", threading.RLock())
    with _guard:
        _locks = (*[known for known in _locks if known() is not None], weakref.ref(lock))
    return lock


def begin_in_child() -> None:
    """For running/forks.py, first of all: another thread of the parent's may have made a lock."""
    _guard._at_fork_reinit()  # type: ignore[attr-defined]  # Python's own modules do so


def holds_lock(besides: Lock | None = None) -> bool:
    """Whether this thread holds a lock of the library's, besides one that is not waited for."""
    locks = [known() for known in _locks]
    return any(is_owned(lock) for lock in locks if lock is not None and lock is not besides)


def is_owned(lock: object) -> bool:
    """Whether this thread holds it."""
    return cast("Lock", lock)._is_owned()
