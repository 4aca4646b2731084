"""What is installed."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from llm_datadist import __version__
from llm_datadist.cli.doctor.finding import Case, Finding, State
from llm_datadist.core.messages import PROTOCOL_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.cli.doctor.finding import Data

_REQUIRED = ("numpy", "msgspec")
#: what each is for
_OPTIONAL = {
    "xxhash": "verify_transfers",
    "torch": "tensors",
    "nixl": "RDMA",
    "prometheus-client": "metrics",
    "opentelemetry-api": "traces",
}


def installed(_: Case) -> Iterator[Finding]:
    """This release, and what it stands on."""
    versions = {"llm-datadist": __version__, **{name: version(name) for name in _REQUIRED}}
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    yield Finding(
        "packages",
        State.OK,
        f"{packages}; protocol {PROTOCOL_VERSION}",
        data={**versions, "protocol": PROTOCOL_VERSION},
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
    yield Finding("system", State.OK, found, data=data)


def extras(_: Case) -> Iterator[Finding]:
    """Packages that the library uses where they are installed."""
    versions = {name: number for name in _OPTIONAL if (number := _version_of(name))}
    missing = [f"{name} ({_OPTIONAL[name]})" for name in _OPTIONAL if name not in versions]
    here = ", ".join(f"{name} {number}" for name, number in versions.items()) or "none"
    found = f"{here}; not installed: {', '.join(missing)}" if missing else here
    yield Finding("optional", State.OK, found, data=versions)


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
