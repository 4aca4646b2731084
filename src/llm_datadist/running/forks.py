"""Forks: what a child process does with what it inherits of its parent's clusters.

A child has one thread, and copies of everything else: connections, a listener, locks that threads
which it does not have may hold. So it lets go of all of it at once, before any of its code runs,
and without a word on any connection: to close a descriptor does nothing to the parent's. Peers then
see the parent's end when the parent ends, and its port is free. What is in memory is kept and never
looked at again; its finalizers would wait for threads. Calls in the child raise, and say that it
has to be initialised there; that works.

This is the one place with a state of the process's own, beside the single LLMDataDist: sockets and
faces that live, held weakly.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable


class Inherited(Protocol):
    """What a program holds of a cluster: LLMDataDist, LlmDataDist."""

    def _forget_parent(self) -> object | None:
        """In the child: this is initialised no more. What must be kept as it is, for ever."""
        ...


FORKED: Final = "this process was forked from the one that initialised it: initialise it here, too"

_faces: weakref.WeakSet[Inherited] = weakref.WeakSet()
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def watch(face: Inherited) -> None:
    """A child that is forked from here on has the face forget its cluster."""
    _register()
    _faces.add(face)


def own(sock: socket.socket) -> socket.socket:
    """A child that is forked from here on closes the socket."""
    _sockets.add(sock)
    return sock


@cache
def _register() -> None:
    import ctypes  # now: a child may find the import lock taken

    keep = ctypes.pythonapi.Py_IncRef  # no finalizer of it will ever run
    keep.argtypes = [ctypes.py_object]
    os.register_at_fork(after_in_child=lambda: _in_child(keep))


def _in_child(keep: Callable[[object], object]) -> None:
    for sock in list(_sockets):
        with suppress(OSError):
            os.close(sock.detach())
    _sockets.clear()
    for face in list(_faces):
        kept = face._forget_parent()
        if kept is not None:
            keep(kept)
    _faces.clear()
