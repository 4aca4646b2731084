"""What reading another process's memory depends on: the path `cma`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.cli.doctor.finding import Case, Finding, State
from llm_datadist.cli.doctor.proc import STATUS, field_of
from llm_datadist.memory import native
from llm_datadist.transport.cma import ptrace_scope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.cli.doctor.finding import Data

_CAP_SYS_PTRACE = 19
#: the inode that the kernel gives the first PID namespace of a host
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
_SCOPES = {
    0: "0: processes of one user may read each other",
    1: "1: by grant, which the library gives to processes of the same user",
    2: "2: only with CAP_SYS_PTRACE",
    3: "3: nobody may read another process until the next boot",
}
_NEVER = 3


def foreign_memory(_: Case) -> Iterator[Finding]:
    """Whether a seccomp filter lets the system call through: nothing else forbids it on oneself."""
    name, mode = "seccomp", {"0": "none", "1": "strict", "2": "a filter"}
    seccomp = mode.get(field_of(STATUS, "Seccomp"), "unknown")
    words = np.array([1, 2], dtype=np.uint64)
    vectors = np.array(
        [[words.ctypes.data, 8], [words.ctypes.data + 8, 8]], dtype=np.uint64
    )  # to the first word, from the second
    base = vectors.ctypes.data
    try:
        native.process_vm_readv(os.getpid(), base, base + 16, 1)
    except OSError as error:
        yield Finding(
            name,
            State.PROBLEM,
            f"process_vm_readv is refused ({error.strerror}); seccomp: {seccomp}",
            "--cap-add SYS_PTRACE, or a seccomp profile that allows process_vm_readv",
            {"process_vm_readv": False, "seccomp": seccomp},
        )
    else:
        found = f"process_vm_readv is allowed; seccomp: {seccomp}"
        yield Finding(name, State.OK, found, data={"process_vm_readv": True, "seccomp": seccomp})


def yama(_: Case) -> Iterator[Finding]:
    """Who may read whom, beyond the rule of the same user."""
    scope, has_capability = ptrace_scope(), _has_capability()
    denied = scope >= _NEVER or (scope > 1 and not has_capability)
    yield Finding(
        "ptrace scope",
        State.PROBLEM if denied else State.OK,
        _SCOPES.get(scope, str(scope)),
        "sysctl kernel.yama.ptrace_scope=1, or --cap-add SYS_PTRACE" if denied else "",
        {"scope": scope},
    )


def capability(_: Case) -> Iterator[Finding]:
    """CAP_SYS_PTRACE, which only links between users and ptrace scope 2 need."""
    name, has_capability = "capability", _has_capability()
    data: Data = {"cap_sys_ptrace": has_capability, "uid": os.getuid()}
    if has_capability:
        found = "CAP_SYS_PTRACE: may read the processes of other users too"
    else:
        found = f"no CAP_SYS_PTRACE: reads processes of user {os.getuid()} only, which is enough"
    yield Finding(name, State.OK, found, data=data)


def pid_namespace(_: Case) -> Iterator[Finding]:
    """Peers in another one cannot be named, so not be read."""
    name, namespace = "PID namespace", os.readlink("/proc/self/ns/pid")
    is_first = namespace == _FIRST_PID_NAMESPACE
    data: Data = {"namespace": namespace, "is_host": is_first}
    if is_first:
        yield Finding(name, State.OK, "the host's", data=data)
        return
    yield Finding(
        name,
        State.NOTE,
        "a container's own: peers in other containers of this host are reached by tcp",
        "start containers that link with one namespace: --pid=host or --pid=container:NAME",
        data,
    )


def _has_capability() -> bool:
    return bool(int(field_of(STATUS, "CapEff"), 16) >> _CAP_SYS_PTRACE & 1)
