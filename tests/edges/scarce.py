"""A process that the system gives no more threads."""

from __future__ import annotations

import ctypes
import importlib
import os
import pkgutil
import resource
from contextlib import suppress

_PR_SET_DUMPABLE = 4
#: what a cluster may import when it is first needed
_PARTS = (
    "core",
    "directory",
    "following",
    "links",
    "memory",
    "observe",
    "owner",
    "peer",
    "running",
    "transfers",
    "transport",
)


def become_nobody(uid: int) -> None:
    """Gives up root, which the limit on processes does not bind; each test has its own uid.

    Peers of the same uid may go on to read this process's memory, as they may those of root.
    """
    importlib.import_module("encodings.idna")  # files cannot be read later
    for part in _PARTS:
        package = importlib.import_module(f"llm_datadist.{part}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            with suppress(ImportError):
                importlib.import_module(module.name)
    if os.getuid() == 0:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    assert ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1) == 0


def limit_threads(more: int = 0) -> None:
    """So many threads may be started from here on in this process, over all of its user."""
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    resource.setrlimit(resource.RLIMIT_NPROC, (_count_of_user() + more, hard))


def lift_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))


def _count_of_user() -> int:
    count = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended
            if os.stat(f"/proc/{process}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{process}/task"))
    return count
