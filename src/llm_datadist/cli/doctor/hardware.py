"""What could make links faster than cma and tcp do: NIXL, RDMA, GPUs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from llm_datadist.cli.doctor.finding import Case, Finding, State
from llm_datadist.cli.doctor.proc import field_of, text_of
from llm_datadist.transport import nixl_agent

if TYPE_CHECKING:
    from collections.abc import Iterator

_RDMA = Path("/sys/class/infiniband")
_GPUS = Path("/proc/driver/nvidia/gpus")
_WAIT_S = 10.0


def nixl(_: Case) -> Iterator[Finding]:
    """Whether NIXL can be imported: in another process, which it may take down with it."""
    module = nixl_agent.package()
    if module is None:
        remedy = "for RDMA between hosts: pip install --no-deps nixl-cu12"
        yield Finding("NIXL", State.UNAVAILABLE, "not installed", remedy)
        return
    name = module.replace("_", "-")
    data = {"module": module, "version": _version_of(name)}
    package = f"{name} {data['version']}"
    failure = _import_failure(module)
    if failure:
        found = f"{package} cannot be imported: {failure}"
        yield Finding("NIXL", State.NOTE, found, f"python -c 'import {module}' shows it all", data)
    else:
        yield Finding("NIXL", State.OK, f"{package} can be imported", data=data)


def rdma(_: Case) -> Iterator[Finding]:
    """The RDMA devices that the kernel knows."""
    devices = sorted(_RDMA.iterdir()) if _RDMA.is_dir() else []
    if not devices:
        yield Finding("RDMA", State.UNAVAILABLE, "no device: links to other hosts use tcp")
        return
    names = [f"{device.name} ({_port_state(device)})" for device in devices]
    found = f"{', '.join(names)}: only NIXL makes use of it"
    yield Finding("RDMA", State.NOTE, found, data={"devices": len(names)})


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


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _port_state(device: Path) -> str:
    states = [text_of(port / "state") for port in sorted((device / "ports").glob("*"))]
    return ", ".join((state or "?").partition(": ")[2].lower() or "?" for state in states)


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
