"""The kernel of the bed: Debian's own, unpacked and never installed, and what it boots into.

It sees this machine's files, so the first file system that it unpacks needs little: busybox, the
modules that lead to those files, and `init.sh`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from bed import HERE

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Debian's packages: for the machine, and for what runs in it
PACKAGES: Final = (
    "qemu-system-x86", "busybox-static", "kmod", "cpio",
    "rdma-core", "ibverbs-providers", "iproute2", "iperf3", "ethtool", "util-linux",
)  # fmt: skip
#: what leads to this machine's files; all others are loaded from there
_MODULES: Final = ("virtio_pci", "9pnet_virtio", "9p", "crc32_generic", "overlay")
_COMMANDS: Final = ("sh", "cat", "chroot", "echo", "insmod", "mkdir", "mount", "poweroff")


class Kernel(NamedTuple):
    """What is booted."""

    image: Path
    initrd: Path
    #: a folder with `lib/modules`, for `modprobe --dirname`
    root: Path


def install() -> None:
    """Has the system install what is missing of the packages. Raises CalledProcessError."""
    missing = [name for name in PACKAGES if not _is_installed(name)]
    if missing:
        _run("apt-get", "update", "--quiet")
        _run("apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *missing)


def fetch(folder: Path) -> Kernel:
    """The kernel in that folder, downloaded and unpacked if it is not there yet."""
    root = folder / "root"
    if not (root / "boot").is_dir():
        unpacking = folder / "unpacking"
        shutil.rmtree(unpacking, ignore_errors=True)
        unpacking.mkdir(parents=True)
        _run("apt-get", "download", "--quiet", _package(), cwd=unpacking)
        (archive,) = unpacking.glob("linux-image-*.deb")
        _run("dpkg", "--extract", str(archive), str(unpacking))
        archive.unlink()
        version = next((unpacking / "lib/modules").iterdir()).name
        _run("depmod", "--basedir", str(unpacking), version)
        unpacking.rename(root)
    (image,) = (root / "boot").glob("vmlinuz-*")
    initrd = folder / "initrd"
    # anew each time, as `init.sh` may have changed; others may be booting the former one
    packed = folder / f"initrd.{os.getpid()}"
    _pack(packed, root, image.name.partition("-")[2])
    packed.rename(initrd)
    return Kernel(image, initrd, root)


def _is_installed(package: str) -> bool:
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package]
    said = subprocess.run(query, capture_output=True, text=True, check=False)
    return said.stdout == "installed"


def _package() -> str:
    """The newest kernel's: its name has its version in it."""
    said = _output("apt-cache", "depends", "linux-image-amd64")
    return next(line.split()[-1] for line in said.splitlines() if "Depends: linux-image-" in line)


def _pack(initrd: Path, root: Path, version: str) -> None:
    """The first file system, in the archive that the kernel unpacks."""
    content = Path(f"{initrd}.d")
    for name in ("bin", "dev", "proc", "sys", "modules", "layers", "machine"):
        (content / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, content / "bin/busybox")
    for command in _COMMANDS:
        (content / "bin" / command).symlink_to("busybox")
    loading = []
    for module in _modules(root, version):
        shutil.copy(module, content / "modules")
        loading.append(f"insmod /modules/{module.rpartition('/')[2]}\n")
    (content / "modules/load.sh").write_text("".join(loading))
    shutil.copy(HERE / "init.sh", content / "init")
    (content / "init").chmod(0o755)
    with initrd.open("wb") as archive:
        files = _output("find", ".", cwd=content)
        subprocess.run(
            ["cpio", "--create", "--format=newc", "--quiet"],
            input=files.encode(), stdout=archive, cwd=content, check=True,
        )  # fmt: skip
    shutil.rmtree(content)


def _modules(root: Path, version: str) -> Iterator[str]:
    """The files of the modules and of what they need, in the order in which they are loaded."""
    seen: dict[str, None] = {}
    for name in _MODULES:
        said = _output(
            "modprobe", "--dirname", str(root), "--set-version", version, "--show-depends", name
        )
        seen |= dict.fromkeys(
            line.split()[1] for line in said.splitlines() if line.startswith("insmod")
        )
    return iter(seen)


def _run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def _output(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout
