"""This host: what a process may have of it, and what is installed."""

from __future__ import annotations

import os
import platform
import resource
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from llm_datadist import __version__
from llm_datadist.cli.doctor.findings import Case, Finding, State
from llm_datadist.cli.kernel_files import free_nbytes, text_of
from llm_datadist.core.messages import PROTOCOL_VERSION
from llm_datadist.peer.streams import MAX_STREAMS
from llm_datadist.transport import ucx
from llm_datadist.transport.nixl_agent import package

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.cli.doctor.findings import Data

STATUS = Path("/proc/self/status")
#: one control connection, and the streams of both ends' threads
_LINK_DESCRIPTORS = 1 + 2 * MAX_STREAMS
#: what else a process with a cluster has open
_OTHER_DESCRIPTORS = 64
#: a prefill or decode process with fewer links is an exception
_FEW_LINKS = 4
_LITTLE_NBYTES = 2**30
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SHARED_MEMORY = "/dev/shm"
_REQUIRED = ("numpy", "msgspec")
#: what each is for
_OPTIONAL = {
    "xxhash": "verify_transfers",
    "cryptography": "fast TLS",
    "torch": "tensors",
    "nixl": "RDMA",
    "prometheus-client": "metrics",
    "opentelemetry-api": "traces",
}


def descriptors(_: Case) -> Iterator[Finding]:
    """How many links they are enough for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    links = max(0, soft - _OTHER_DESCRIPTORS) // _LINK_DESCRIPTORS
    data = {"soft": soft, "hard": hard, "links": links}
    some = "1 link at its" if links == 1 else f"{links} links at their"
    name, found = "descriptors", f"{soft}: enough for {some} busiest"
    if links >= _FEW_LINKS:
        yield Finding(name, State.OK, found, data=data, brief=str(soft))
    else:
        remedy = (
            f"ulimit -n {hard}"
            if hard > soft
            else "raise the hard limit: LimitNOFILE=65536 (systemd), --ulimit nofile=65536 (docker)"
        )
        yield Finding(name, State.PROBLEM, found, remedy, data)


def memory(_: Case) -> Iterator[Finding]:
    """What is left of the host's memory, or of the container's."""
    free, is_container = free_nbytes()
    found = f"{_gib(free)} free{' in this container' if is_container else ''}"
    is_little = free < _LITTLE_NBYTES
    remedy = "KV caches are large: free some, or raise the limit" if is_little else ""
    state = State.NOTE if is_little else State.OK
    yield Finding("memory", state, found, remedy, {"free_nbytes": free}, _gib(free))


def shared_memory(_: Case) -> Iterator[Finding]:
    """/dev/shm, which UCX takes on one host; cma and tcp do without."""
    usage = os.statvfs(_SHARED_MEMORY)
    free = usage.f_bavail * usage.f_frsize
    found = f"{_gib(free)} free in {_SHARED_MEMORY}; only NIXL takes some"
    remedy = "for NIXL in a container: --shm-size=1g" if free < _LITTLE_NBYTES else ""
    yield Finding(
        "shared memory", State.NOTE if remedy else State.OK, found, remedy, {"free_nbytes": free}
    )


def locked_memory(_: Case) -> Iterator[Finding]:
    """What may be locked: RDMA locks all that is registered."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        yield Finding("memlock", State.OK, "unlimited", data={"soft": soft})
        return
    found = f"{_gib(soft)}: no matter for cma and tcp; RDMA needs more"
    remedy = "for RDMA: ulimit -l unlimited (--ulimit memlock=-1)"
    is_needed = ucx.has_active_port() and package() is not None
    state = State.PROBLEM if is_needed else State.NOTE
    yield Finding("memlock", state, found, remedy, {"soft": soft})


def huge_pages(_: Case) -> Iterator[Finding]:
    """Whether pools get the huge pages that they ask for."""
    text = text_of(_HUGE_PAGES) or "[never]"
    setting = text[text.find("[") + 1 : text.find("]")]
    data = {"transparent_hugepage": setting}
    if setting == "never":
        remedy = f"echo madvise > {_HUGE_PAGES}"
        found = "off: transfers to and from memory pools are about an eighth slower"
        yield Finding("huge pages", State.NOTE, found, remedy, data)
    else:
        yield Finding("huge pages", State.OK, f"{setting}: memory pools get them", data=data)


def installed(_: Case) -> Iterator[Finding]:
    """This release, and what it stands on."""
    versions = {"llm-datadist": __version__, **{name: version(name) for name in _REQUIRED}}
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    yield Finding(
        "packages",
        State.OK,
        f"{packages}; protocol {PROTOCOL_VERSION}",
        data={**versions, "protocol": PROTOCOL_VERSION},
        brief=__version__,
    )


def system(_: Case) -> Iterator[Finding]:
    """The interpreter, the kernel, the processor."""
    cores = len(os.sched_getaffinity(0))
    data: Data = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": cores,
    }
    found = "Python {python}, Linux {kernel}, {machine}, {cores} cores".format_map(data)
    yield Finding("system", State.OK, found, data=data, brief=f"Python {data['python']}")


def extras(_: Case) -> Iterator[Finding]:
    """Packages that the library uses where they are installed."""
    versions = {name: number for name in _OPTIONAL if (number := version_of(_installed_as(name)))}
    missing = [f"{name} ({_OPTIONAL[name]})" for name in _OPTIONAL if name not in versions]
    here = ", ".join(f"{name} {number}" for name, number in versions.items()) or "none"
    found = f"{here}; not installed: {', '.join(missing)}" if missing else here
    yield Finding("optional", State.OK, found, data=versions)


def _installed_as(name: str) -> str:
    """NIXL has a package for each CUDA."""
    return (package() or name).replace("_", "-") if name == "nixl" else name


def version_of(name: str) -> str:
    """The version of an installed package; empty when it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
