"""Processes that share this host, and not all of what makes one."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import platform
import stat
import struct
import subprocess
from contextlib import contextmanager
from multiprocessing import spawn
from typing import TYPE_CHECKING

import pytest

from llm_datadist.testing.cluster import Node, NodeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_FILTER = 4, 38, 22, 2
_CLONE_NEWNET = 0x40000000
#: process_vm_readv
_NUMBERS = {"x86_64": 310, "aarch64": 270}
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _EPERM = 0x7FFF0000, 0x00050001

needs_root = pytest.mark.skipif(
    os.getuid() != 0, reason="to be another user, or have namespaces of one's own, needs root"
)

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def unshared(folder: Path, *namespaces: str) -> Iterator[NodeProcess]:
    """A process with namespaces of its own, as unshare(1) names them. Skips where it may not."""
    prefix = ["unshare", *namespaces, "--kill-child", "--fork"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no {' '.join(namespaces)} here: {tried.stderr.strip()}")
    before, starter = spawn.get_executable(), folder / "python"
    starter.write_text(f'#!/bin/sh\nexec {" ".join(prefix)} "{os.fsdecode(before)}" "$@"\n')
    starter.chmod(starter.stat().st_mode | stat.S_IXUSR)
    mp.set_executable(str(starter))
    try:
        process = NodeProcess()
    finally:
        mp.set_executable(before)
    with process:
        yield process


def hide_tmp(_: Node) -> None:
    """Puts an empty /tmp over the one that others see, in this mount namespace."""
    subprocess.run(["mount", "-t", "tmpfs", "none", "/tmp"], check=True)


def become(_: Node, uid: int) -> None:
    """Gives up root; peers of that user may read this process all the same."""
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _libc.prctl(_PR_SET_DUMPABLE, 1)


def leave_network(_: Node) -> None:
    """Takes this process to a network namespace of its own. Raises OSError."""
    _check(_libc.unshare(_CLONE_NEWNET), "unshare")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def refuse_foreign_memory(_: Node) -> None:
    """As the seccomp profile of many a container: process_vm_readv is not permitted here.

    Raises OSError; KeyError on a machine whose system calls we do not know.
    """
    lines = (
        (_LOAD, 0, 0, 0),  # the number of the system call
        (_JUMP_IF_EQUAL, 0, 1, _NUMBERS[platform.machine()]),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = _Program(len(lines), ctypes.addressof(code))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(program), 0, 0))


def _check(result: int, what: str = "prctl") -> None:
    if result:
        raise OSError(ctypes.get_errno(), what)
