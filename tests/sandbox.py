"""What a sandbox does to a process: system calls come back with an error, or with nothing done.

As a script: runs the command of its arguments without access to other processes' memory.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

#: process_vm_readv, process_vm_writev, setsockopt
_NUMBERS = {"x86_64": (310, 311, 54), "aarch64": (270, 271, 208)}
_SOL_TCP, _TCP_ULP, _SOL_TLS = 6, 31, 282

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
#: where the number of the call is, and its second and third argument
_NUMBER, _SECOND, _THIRD = 0, 24, 32


def forbid_foreign_memory(_: object = None) -> None:
    """`process_vm_readv` fails with EPERM, as in many a container."""
    reading, writing, _ = _NUMBERS[platform.machine()]
    _install(
        (_LOAD_WORD, 0, 0, _NUMBER),
        (_JUMP_IF_EQUAL, 2, 0, reading),
        (_JUMP_IF_EQUAL, 1, 0, writing),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    )


def pretend_kernel_tls(_: object = None) -> None:
    """Sockets take the kernel's TLS and its keys, and send in plain."""
    *_, setsockopt = _NUMBERS[platform.machine()]
    _install(
        (_LOAD_WORD, 0, 0, _NUMBER),
        (_JUMP_IF_EQUAL, 0, 6, setsockopt),
        (_LOAD_WORD, 0, 0, _SECOND),
        (_JUMP_IF_EQUAL, 3, 0, _SOL_TLS),
        (_JUMP_IF_EQUAL, 0, 3, _SOL_TCP),
        (_LOAD_WORD, 0, 0, _THIRD),
        (_JUMP_IF_EQUAL, 0, 1, _TCP_ULP),
        (_RETURN, 0, 0, _ERRNO),
        (_RETURN, 0, 0, _ALLOW),
    )


def _install(*instructions: tuple[int, int, int, int]) -> None:
    """From here on, in this thread and those it starts. Raises OSError."""
    code = b"".join(struct.pack("=HBBI", *each) for each in instructions)
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(instructions), ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid_foreign_memory()
    os.execv(sys.argv[1], sys.argv[1:])
