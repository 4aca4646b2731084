"""Presence: threads that are in something, and a wait for all of them that nothing cuts short.

Each wait of Python's own ends when a signal's handler raises, and however often it is begun anew,
one more exception strikes between two of them. For what must have ended before a call may raise
there is a lock of the system's: to take it is one step, which goes on behind a handler.
"""

from __future__ import annotations

import ctypes
from typing import Final

#: more than a pthread_rwlock_t of any system has; zeros are one that nobody holds
_LOCK = ctypes.c_uint64 * 16

_libc = ctypes.CDLL(None)
#: `WAIT_FOR_ALL(presence.lock)`, once: all that are in it have left then, and nobody enters it
WAIT_FOR_ALL: Final = _libc.pthread_rwlock_wrlock


class Presence:
    """Who is in it. Thread-safe."""

    __slots__ = ("lock",)

    def __init__(self) -> None:
        self.lock = _LOCK()

    def enter(self) -> bool:
        """Whether this thread is in it, which then must `leave`; else all was waited for."""
        return not _libc.pthread_rwlock_tryrdlock(self.lock)

    def leave(self) -> None:
        _libc.pthread_rwlock_unlock(self.lock)
