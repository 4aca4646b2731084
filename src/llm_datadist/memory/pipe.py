"""Copies by address through a pipe, where the system refuses `process_vm_readv` on ourselves.

A container's seccomp profile may, and a sandbox's kernel may not have the call; pipes are
everywhere, and the kernel checks addresses on both sides of one. A quarter as fast here. Rejected:
`/proc/self/mem`, as fast, which sandboxes lack, and which reads what is mapped without access.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

from llm_datadist.core.segments import skip_bytes
from llm_datadist.memory import native
from llm_datadist.system_errors import refusals_ignored

if TYPE_CHECKING:
    from llm_datadist.core.segments import U64

#: the most that users are given, by default; with 64 KiB a copy takes half as long again
_NBYTES = 1024 * 1024


def copy(dst: U64, src: U64) -> int:
    """Copies between vectors of as many bytes; the bytes up to the first bad address.

    Raises OSError when there is no pipe to be had. Thread-safe: each call has a pipe of its own.
    """
    # full or empty, it must not be waited for
    out, into = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with refusals_ignored():  # the user has too many of that size; it works with less
            fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, _NBYTES)
        return _copy(out, into, dst.copy(), src.copy())
    finally:
        os.close(out)
        os.close(into)


def _copy(out: int, into: int, dst: U64, src: U64) -> int:
    moved, window = 0, native.IOV_MAX
    while len(src):
        try:
            written = native.writev(into, src[:window])
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            if window == 1:
                break
            window = 1  # one bad vector fails a page that has good ones in front of it
            continue
        src = skip_bytes(src, written, window)
        while written:
            try:
                read = native.readv(out, dst)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                return moved
            dst = skip_bytes(dst, read, native.IOV_MAX)
            written -= read
            moved += read
    return moved
