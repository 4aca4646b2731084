"""Locks, and whether this thread holds one: then it must not wait for another thread.

A signal's handler, or a finalizer, runs in the middle of whatever its thread does, under one of our
locks too. It may call us: the locks are re-entrant. But what another thread does for that call may
need the lock, which this one does not give back before the call returns. So whoever hands work to
another thread and waits asks here first: it does the work itself, or does not wait, or refuses.
"""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import Protocol, cast


class Lock(Protocol):
    """What `threading.RLock` makes: entering and leaving it are one step each (running/bell.py)."""

    def __enter__(self) -> bool: ...

    def __exit__(self, *exc_info: object) -> None: ...

    def acquire(self) -> bool: ...

    def release(self) -> None: ...

    def _is_owned(self) -> bool: ...


#: by their addresses, in single steps: finalizers may strike anywhere, and a child be forked
_locks: dict[int, weakref.ref[Lock]] = {}


def make_lock() -> Lock:
    """A re-entrant lock that `holds_lock` knows of."""
    lock = cast("Lock", threading.RLock())
    # by `partial`, which runs no code of Python's that a signal's handler could break off
    _locks[id(lock)] = weakref.ref(lock, partial(_locks.pop, id(lock)))
    return lock


def holds_lock(besides: Lock | None = None) -> bool:
    """Whether this thread holds a lock of the library's, besides one that is not waited for."""
    locks = [known() for known in list(_locks.values())]
    return any(is_owned(lock) for lock in locks if lock is not None and lock is not besides)


def is_owned(lock: object) -> bool:
    """Whether this thread holds it."""
    return cast("Lock", lock)._is_owned()
