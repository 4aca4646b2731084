"""What each path depends on: cma, the network, and what could be faster than both."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.cli.doctor.findings import Case, Finding, State
from llm_datadist.cli.doctor.host import STATUS, version_of
from llm_datadist.cli.kernel_files import field_of
from llm_datadist.credential_file import is_public
from llm_datadist.errors import LLMException
from llm_datadist.link_security import LinkSecurity
from llm_datadist.links.listener import bind
from llm_datadist.memory import native
from llm_datadist.options import PATH_VARIABLE, SECURITY_VARIABLE, check_transfer_path
from llm_datadist.transport import ktls, nixl_agent, records
from llm_datadist.transport.cma import ptrace_scope
from llm_datadist.transport.credentials import load_tls

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.cli.doctor.findings import Data

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

_DAY_S = 24 * 60 * 60
#: a certificate that ends sooner has to be renewed now
_SOON_DAYS = 14
_SECURITY = "link security"
_EXAMPLE = '{"secret_file": "/etc/kv/secret"}'

_GPUS = Path("/proc/driver/nvidia/gpus")
_WAIT_S = 10.0


# -- the same host: reading another process's memory --


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
    scope, has_capability = ptrace_scope() or 0, _has_capability()
    remedy = ""
    if scope >= _NEVER:
        remedy = "kernel.yama.ptrace_scope=1 in /etc/sysctl.d, and boot: until then links use tcp"
    elif scope > 1 and not has_capability:
        remedy = "sysctl kernel.yama.ptrace_scope=1, or --cap-add SYS_PTRACE"
    yield Finding(
        "ptrace scope",
        State.PROBLEM if remedy else State.OK,
        _SCOPES.get(scope, str(scope)),
        remedy,
        {"scope": scope},
    )


def capability(_: Case) -> Iterator[Finding]:
    """CAP_SYS_PTRACE, which only ptrace scope 2 needs."""
    name, has_capability = "capability", _has_capability()
    data: Data = {"cap_sys_ptrace": has_capability, "uid": os.getuid()}
    if has_capability:
        found = "CAP_SYS_PTRACE: ptrace scope 2 is no hindrance"
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


# -- the network: where a cluster would listen, and who would be let in --


def listening(case: Case) -> Iterator[Finding]:
    """Whether the address can be had, and is not open to strangers."""
    name, listen = "listening", case.listen
    if listen is None:
        remedy = "--listen IP:PORT tries the address of LLMConfig.listen_ip_info"
        yield Finding(name, State.NOTE, "not tried: no address given", remedy)
        return
    data: Data = {"endpoint": str(listen), "is_loopback": listen.is_loopback}
    try:
        bind(listen).close()
    except LLMException as error:
        cause = error.__cause__
        is_taken = isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE
        remedy = f"ss -ltnp sport = :{listen.port} shows who has it" if is_taken else ""
        yield Finding(name, State.PROBLEM, str(error), remedy, data)
        return
    if listen.is_loopback or os.environ.get(SECURITY_VARIABLE):
        yield Finding(name, State.OK, f"{listen} can be had", data=data)
        return
    found = f"{listen} can be had, and whoever reaches it can link and read what is registered"
    remedy = f"set {SECURITY_VARIABLE} or LLMConfig.link_security"
    yield Finding(name, State.PROBLEM, found, remedy, data)


def allowed_path(_: Case) -> Iterator[Finding]:
    """What the environment says of paths."""
    name, path = "allowed paths", os.environ.get(PATH_VARIABLE) or "auto"
    try:
        check_transfer_path(PATH_VARIABLE, path)
    except LLMException as error:
        yield Finding(name, State.PROBLEM, str(error), f"unset {PATH_VARIABLE}")
        return
    if path == "auto":
        yield Finding(name, State.OK, "all: each link takes its best one", data={"path": path})
        return
    found = f"{path} only, by {PATH_VARIABLE}"
    yield Finding(name, State.NOTE, found, f"unset {PATH_VARIABLE}", {"path": path})


def link_security(_: Case) -> Iterator[Finding]:
    """What the environment says of link security, and whether it can be used."""
    text = os.environ.get(SECURITY_VARIABLE)
    if not text:
        found = f"{SECURITY_VARIABLE} is not set: a cluster that sets none lets everybody in"
        remedy = 'openssl rand -hex 32 > FILE; {"secret_file": "FILE"}'
        yield Finding(_SECURITY, State.NOTE, found, remedy, {"kind": "none"})
        return
    try:
        security = LinkSecurity.parse(text, SECURITY_VARIABLE)
        if security.secret is None:
            yield _certificate(security)
        else:
            yield _secret(json.loads(text).get("secret_file"))
    except LLMException as error:
        yield Finding(
            _SECURITY,
            State.PROBLEM,
            str(error),
            f"no cluster starts with it; one that does: {_EXAMPLE}",
        )


def _secret(file: str | None) -> Finding:
    data = {"kind": "secret"}
    if file is None:
        remedy = 'a file is better: {"secret_file": "/path"}'
        return Finding(_SECURITY, State.OK, "a shared secret, in the environment", remedy, data)
    return _kept(file) or Finding(_SECURITY, State.OK, f"a shared secret, in {file}", data=data)


def _certificate(security: LinkSecurity) -> Finding:
    """Has both ends of a link with this certificate shake hands. Raises LLMException."""
    if (finding := _kept(security.key)) is not None:
        return finding
    days = (load_tls(security).ends_at - time.time()) / _DAY_S
    encryption, how = _sealed_by()
    data: Data = {"kind": "tls", "days_left": round(days, 1), "encryption": encryption}
    found = f"mutual TLS, {how}; {security.certificate} or its CA ends in {days:.0f} days"
    if days < _SOON_DAYS:
        remedy = "renew it now; clusters that run take the new files by themselves"
        return Finding(_SECURITY, State.PROBLEM, found, remedy, data)
    return Finding(_SECURITY, State.OK, found, data=data)


def _sealed_by() -> tuple[str, str]:
    """What this end can have seal TCP's connections, if the other end can, too; and why no better.

    As links call it, and in words.
    """
    if not (no_kernel := ktls.why_not()):
        return ktls.ENCRYPTION, "sealed by the kernel"
    if not (no_records := records.why_not()):
        return "tls-records", f"sealed in records of our own: {no_kernel}"
    return "tls", f"sealed by TLS alone, slowly: {no_kernel}; {no_records}"


def _kept(file: str) -> Finding | None:
    """That everybody on this host can read what must be secret."""
    if not is_public(file):
        return None
    found = f"every user of this host can read {file}"
    return Finding(_SECURITY, State.PROBLEM, found, f"chmod o-r {file}")


# -- other paths: NIXL, GPUs; for RDMA see rdma.py --


def nixl(_: Case) -> Iterator[Finding]:
    """Whether NIXL can be imported: in another process, which it may take down with it."""
    module = nixl_agent.package()
    if module is None:
        remedy = "for RDMA between hosts: pip install --no-deps nixl-cu12"
        yield Finding("NIXL", State.UNAVAILABLE, "not installed", remedy)
        return
    name = module.replace("_", "-")
    data = {"module": module, "version": version_of(name) or "of unknown version"}
    package = f"{name} {data['version']}"
    failure = _import_failure(module)
    if failure:
        found = f"{package} cannot be imported: {failure}"
        yield Finding("NIXL", State.NOTE, found, f"python -c 'import {module}' shows it all", data)
    else:
        yield Finding("NIXL", State.OK, f"{package} can be imported", data=data)


def gpus(_: Case) -> Iterator[Finding]:
    """NVIDIA's GPUs, as the driver tells."""
    models = _gpu_models()
    if not models:
        yield Finding("CUDA", State.UNAVAILABLE, "no NVIDIA GPU here")
        return
    found = f"{', '.join(models)}: GPU memory is not supported yet"
    remedy = "caches lie in process memory: copy between it and the GPU"
    yield Finding("CUDA", State.NOTE, found, remedy, {"gpus": len(models)})


def _import_failure(module: str) -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True, text=True, timeout=_WAIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it takes longer than {_WAIT_S:.0f} s"
    if done.returncode < 0:
        return f"it ends the process by signal {-done.returncode}"
    return (done.stderr.splitlines() or ["?"])[-1] if done.returncode else ""


def _gpu_models() -> list[str]:
    if _GPUS.is_dir():
        return [field_of(gpu / "information", "Model") for gpu in sorted(_GPUS.iterdir())]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(  # where the driver is another system's, as in WSL
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True, text=True, timeout=_WAIT_S, check=False,
    )  # fmt: skip
    return done.stdout.splitlines() if done.returncode == 0 else []
