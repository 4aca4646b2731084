"""Processes that share this host, and not all of what makes one."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import stat
import subprocess
from contextlib import contextmanager
from multiprocessing import spawn
from typing import TYPE_CHECKING

import pytest

from llm_datadist.testing.cluster import Node, NodeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PR_SET_DUMPABLE = 4
_CLONE_NEWNET = 0x40000000

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


def _check(result: int, what: str = "prctl") -> None:
    if result:
        raise OSError(ctypes.get_errno(), what)
