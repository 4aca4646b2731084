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
import threading
import weakref
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable


class Inherited(Protocol):
    """What a program holds of a cluster: LLMDataDist, LlmDataDist."""

    def _forget_parent(self) -> object | None:
        """In the child: this is initialised no more. What must be kept as it is, for ever."""
        ...


FORKED: Final = "this process was forked from the one that initialised it: initialise it here, too"

# Not WeakSets: these run code of Python's where an object dies, and a signal's exception that
# strikes there is lost.
_faces: list[weakref.ref[Inherited]] = []
_sockets: list[weakref.ref[socket.socket]] = []
#: dead references are taken out when there are more than this and twice the living
_MANY: Final = 256
_most_sockets = _MANY
_lock = threading.RLock()


def watch(face: Inherited) -> None:
    """A child that is forked from here on has the face forget its cluster."""
    _register()
    _faces[:] = [known for known in _faces if known() is not None]
    _faces.append(weakref.ref(face))


def open_socket(family: int, opened: list[socket.socket] | None = None) -> socket.socket:
    """A stream socket, which a forked child closes. Raises OSError.

    It is in `opened` before it is open: whoever is interrupted at it finds it there.
    """
    import socket

    sock = socket.socket.__new__(socket.socket)
    if opened is not None:
        opened.append(sock)
    with _lock:  # no fork happens meanwhile
        socket.socket.__init__(sock, family, socket.SOCK_STREAM)
        return _own(sock)


def accept(listening: socket.socket) -> tuple[socket.socket, Any]:
    """As `socket.accept`, of a listening socket that does not wait; a forked child closes it."""
    with _lock:
        sock, address = listening.accept()
        return _own(sock), address


def _own(sock: socket.socket) -> socket.socket:
    global _most_sockets
    if len(_sockets) > _most_sockets:
        _sockets[:] = [known for known in _sockets if known() is not None]
        _most_sockets = max(_MANY, 2 * len(_sockets))
    _sockets.append(weakref.ref(sock))
    return sock


@cache
def _register() -> None:
    import ctypes  # now: a child may find the import lock taken

    keep = ctypes.pythonapi.Py_IncRef  # no finalizer of it will ever run
    keep.argtypes = [ctypes.py_object]
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=lambda: _in_child(keep)
    )


def _in_child(keep: Callable[[object], object]) -> None:
    for sock in [known() for known in _sockets]:
        if sock is not None:
            with suppress(OSError):
                os.close(sock.detach())
    _sockets.clear()
    for face in [known() for known in _faces]:
        kept = None if face is None else face._forget_parent()
        if kept is not None:
            keep(kept)
    _faces.clear()
    _lock.release()
