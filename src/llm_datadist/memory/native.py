"""System calls that move bytes by address. Beside `running/presence.py` none calls libc.

All of them let go of the GIL while they run, and none touches memory itself: the kernel does, and
answers EFAULT where a load or store of ours would crash.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.core.segments import U64

#: the kernel takes no more iovecs in one call
IOV_MAX = 1024
MSG_DONTWAIT, MSG_NOSIGNAL, MSG_WAITALL = 0x40, 0x4000, 0x100
_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1).value

_libc = ctypes.CDLL(None, use_errno=True)

_process_vm_readv = _libc.process_vm_readv
_process_vm_readv.restype = ctypes.c_ssize_t
_process_vm_readv.argtypes = (
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_ulong) * 2,
    ctypes.c_ulong,
)


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_sendmsg, _recvmsg = _libc.sendmsg, _libc.recvmsg
_writev, _readv = _libc.writev, _libc.readv
for _call in (_sendmsg, _recvmsg, _writev, _readv):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]


def process_vm_readv(
    pid: int, local_addr: int, remote_addr: int, count: int, remote_count: int | None = None
) -> int:
    """Copies from `pid`'s iovecs to ours; both arrays lie here and have `count` elements.

    The one of `pid`'s may have another count. The bytes of both are one sequence. Returns the bytes
    copied, fewer than asked for where an address is bad. Raises OSError.
    """
    theirs = count if remote_count is None else remote_count
    moved: int = _process_vm_readv(pid, local_addr, count, remote_addr, theirs, 0)
    if moved < 0:  # not by `_retried` at once: small reads are a few microseconds in all
        return _retried(_process_vm_readv, pid, local_addr, count, remote_addr, theirs, 0)
    return moved


def sendmsg(fd: int, vectors: U64, flags: int = 0) -> int:
    """Sends from memory by address, at most IOV_MAX vectors; the bytes sent. Raises OSError."""
    header = _Msghdr(iov=vectors.ctypes.data, iovlen=min(len(vectors), IOV_MAX))
    return _retried(_sendmsg, fd, ctypes.byref(header), flags | MSG_NOSIGNAL)


def recvmsg(fd: int, vectors: U64, flags: int = 0) -> int:
    """Receives into memory by address, at most IOV_MAX vectors; 0 is the end. Raises OSError."""
    header = _Msghdr(iov=vectors.ctypes.data, iovlen=min(len(vectors), IOV_MAX))
    return _retried(_recvmsg, fd, ctypes.byref(header), flags)


def writev(fd: int, vectors: U64) -> int:
    """Writes from memory by address, at most IOV_MAX vectors; the bytes written. Raises OSError."""
    return _retried(_writev, fd, vectors.ctypes.data, min(len(vectors), IOV_MAX))


def readv(fd: int, vectors: U64) -> int:
    """Reads into memory by address, at most IOV_MAX vectors; the bytes read. Raises OSError."""
    return _retried(_readv, fd, vectors.ctypes.data, min(len(vectors), IOV_MAX))


def allow_tracing_by_same_user() -> None:
    """Lets this user's processes read our memory where Yama wants a grant. Raises OSError."""
    _retried(_libc.prctl, _PR_SET_PTRACER, ctypes.c_ulong(_PR_SET_PTRACER_ANY), 0, 0, 0)


def _retried(call: Callable[..., int], *args: object) -> int:
    while True:
        result = call(*args)
        if result >= 0:
            return result
        code = ctypes.get_errno()
        if code != errno.EINTR:  # a signal's Python handler runs before the next turn
            raise OSError(code, os.strerror(code))
