"""Forks: what a child process does with what it inherits of its parent's clusters.

A child has one thread, and copies of everything else: connections, a listener, locks that threads
which it does not have may hold. So it lets go of all of it at once, before any of its code runs,
and without a word on any connection: to close a descriptor does nothing to the parent's. Peers then
see the parent's end when the parent ends, and its port is free. What is in memory is kept and never
looked at again; its finalizers would wait for threads. Calls in the child raise, and say that it
has to be initialised there; that works.

No signal's handler strikes in the middle of that: from in front of the fork until behind it the
forking thread takes no signals. A child has no other thread that could take them for it.

This is the one place with a state of the process's own, beside the single LLMDataDist: sockets and
faces that live, held weakly.
"""

from __future__ import annotations

import os
import signal
import weakref
from contextlib import suppress
from functools import cache, partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final, Protocol

from llm_datadist.locks import make_lock

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator


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
#: held while a descriptor is made and not yet noted; a fork waits for it
_lock = make_lock()
#: which signals the threads that are forking took before: the last one is that of the last fork
_masks: list[set[signal.Signals | int]] = []
_EVERY: Final = signal.valid_signals()


def watch(face: Inherited) -> None:
    """A child that is forked from here on has the face forget its cluster."""
    _register()
    with _lock:
        _faces[:] = [known for known in _faces if known() not in (None, face)]
        _faces.append(weakref.ref(face))


def open_socket(family: int, opened: list[socket.socket] | None = None) -> socket.socket:
    """A stream socket, which a forked child closes. Raises OSError.

    It is in `opened` before it is open: whoever is interrupted at it finds it there.
    """
    import socket

    _register()
    sock = socket.socket.__new__(socket.socket)
    if opened is not None:
        opened.append(sock)
    with _lock:
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
    # One step, as is `release`: a signal that another thread took strikes between any two, and a
    # mask that stays would keep Ctrl-C from this thread for good.
    restore = partial(next, map(signal.pthread_sigmask, repeat(signal.SIG_SETMASK), _taken()))
    os.register_at_fork(after_in_parent=restore)
    os.register_at_fork(
        before=_before, after_in_parent=_lock.release, after_in_child=lambda: _in_child(keep)
    )
    os.register_at_fork(after_in_child=restore)


def _taken() -> Iterator[set[signal.Signals | int]]:
    """Takes out the last mask, for ever."""
    return iter(_masks.pop, None)


def _before() -> None:
    _lock.acquire()
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    signal.pthread_sigmask(signal.SIG_BLOCK, _EVERY)


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
    _lock._at_fork_reinit()  # type: ignore[attr-defined]  # Python's own modules do so
